"""Draw the overview of DivideMix that the README shows.

    python img/framework.py

writes framework.png beside this file. Every length below is in pixels of the README column (830 wide, y down); the
file has twice that resolution. The loss histograms are schematic: two Gaussians chosen by hand, not measured data.
"""

from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.path import Path as Curve
from PIL import Image

WIDTH, HEIGHT = 830, 1266
LEFT, RIGHT, COL = 38, 446, 346  # left edges of the two columns, their width
INK, SOFT, LINE, PANEL = "#1f2328", "#57606a", "#8c959f", "#f6f8fa"
# Blue and vermillion stay apart for colour-blind readers; green and grey may not: "unlabeled" is dashed or lighter too.
NET, NET_TINT = {1: "#0072b2", 2: "#c8500a"}, {1: "#e6f1f9", 2: "#fcebe0"}
SET, SET_TINT = {"X": "#00795a", "U": "#4b535d"}, {"X": "#d9f0e6", "U": "#eceef0"}
ROW = {"X": "#0a8a68", "U": "#c3c9cf"}  # the squares of the MixMatch strips
DASH = {"X": "-", "U": (0, (4, 2.5))}


def text(ax, x, y, s, size=15, color=INK, ha="center", weight="normal"):
    ax.text(x, y, s, fontsize=size * 0.72, color=color, ha=ha, weight=weight, va="center_baseline", zorder=5)


def title(ax, x, y, s, color=INK, ha="center", size=16):
    text(ax, x, y, s, size, color, ha, "bold")


def box(ax, rect, face="white", edge=LINE, lw=1.6, r=7, ls="-", z=2):
    style = f"round,pad=0,rounding_size={r}"
    ax.add_patch(FancyBboxPatch(rect[:2], *rect[2:], boxstyle=style, fc=face, ec=edge, lw=lw, ls=ls, zorder=z))


def chip(ax, x, y, w, s, net, size=15):
    """A filled label in the colour of its network, centred on (x, y)."""
    box(ax, (x - w / 2, y - 14.5, w, 29), face=NET[net], edge=NET[net], r=6, z=4)
    title(ax, x, y, s, "white", size=size)


def card(ax, rect, kind, head, *lines, tint=True):
    """A box of the labeled ("X") or unlabeled ("U") kind: a bold title, lines of text below it, all centred."""
    x, y, w, h = rect
    box(ax, rect, face=SET_TINT[kind] if tint else "white", edge=SET[kind], lw=1.4, ls=DASH[kind])
    y += h / 2 - 11.5 * len(lines)
    title(ax, x + w / 2, y, head, SET[kind])
    for i, s in enumerate(lines, start=1):
        text(ax, x + w / 2, y + 23 * i, s)


def arrow(ax, *points, color=SOFT, lw=1.8):
    """A straight arrow through two points, or a Bezier curve through four."""
    path = Curve(points, [Curve.MOVETO] + ([Curve.LINETO] if len(points) == 2 else [Curve.CURVE4] * 3))
    style = "-|>,head_length=5,head_width=2.8"
    ax.add_patch(FancyArrowPatch(path=path, arrowstyle=style, color=color, lw=lw, capstyle="butt", zorder=3))


def bold(letter, net):
    return rf"$\mathbfit{{{letter}_{net}}}$"


def histogram(ax, x, y, w, h, parts, seed):
    """Schematic losses on the baseline y; parts: (weight, mean, sd), clean then noisy. Returns the x where w = 0.5."""

    def densities(t):
        return [k / sd * np.exp(-0.5 * ((t - mean) / sd) ** 2) for k, mean, sd in parts]

    t = np.linspace(0, 1, 400)
    clean, noisy = densities(t)
    scale = 0.94 * h / (clean + noisy).max()
    jitter = np.random.default_rng(seed)
    for lo, hi in pairwise(np.linspace(0, 1, 31)):
        bar = sum(densities((lo + hi) / 2)) * scale * jitter.uniform(0.8, 1.12)
        ax.add_patch(Rectangle((x + lo * w, y - bar), (hi - lo) * w - 1, bar, fc="#d0d7de", zorder=2))
    for curve, kind in ((clean, "X"), (noisy, "U")):
        ax.plot(x + t * w, y - curve * scale, color=SET[kind], lw=2.2, ls=DASH[kind], zorder=3)
    ax.plot([x, x + w], [y, y], color=SOFT, lw=1.2, zorder=3)
    cut = x + w * t[np.argmax((clean < noisy) & (t > parts[0][1]))]
    ax.plot([cut, cut], [y, y - h - 24], color=INK, lw=1.4, zorder=3)
    return cut


def co_divide(ax, x, y, net, *parts):
    """One column: net -> losses of all samples -> GMM -> clean probability -> labeled / unlabeled."""
    mid, base, half = x + COL / 2, y + 170, (COL - 34) / 2
    box(ax, (x, y, COL, 276), edge=NET[net])
    chip(ax, mid, y, 84, f"net {net}", net, size=16)
    text(ax, mid, y + 32, rf"2-component GMM $\rightarrow$ clean probability $w_{net}$")
    cut = histogram(ax, x + 22, base, COL - 44, 90, parts, seed=net)
    text(ax, cut - 10, base - 104, "likely clean", color=SET["X"], ha="right")
    text(ax, cut + 10, base - 104, "likely noisy", color=SET["U"], ha="left")
    text(ax, mid, base + 17, "loss of every training sample (sketch)", color=SOFT)
    card(ax, (x + 12, y + 210, half, 54), "X", f"labeled {bold('X', net)}", rf"$w_{net} > \tau$")
    card(ax, (x + 22 + half, y + 210, half, 54), "U", f"unlabeled {bold('U', net)}", rf"$w_{net} \leq \tau$")


def epoch_panel(ax, top):
    """One epoch after warm-up: both nets divide, then each trains on the division of the other."""
    box(ax, (14, top, WIDTH - 28, 530), face=PANEL, edge="none", r=12, z=0)
    title(ax, LEFT, top + 25, "Every later epoch: co-divide, then train in turn", ha="left", size=18)
    y, y0, y1 = top + 64, top + 340, top + 430
    co_divide(ax, LEFT, y, 1, (0.58, 0.22, 0.10), (0.50, 0.66, 0.15))
    co_divide(ax, RIGHT, y, 2, (0.52, 0.25, 0.10), (0.56, 0.68, 0.14))
    for net, start, end, offset, ha in ((1, 287, 543, 18, "left"), (2, 543, 287, -18, "right")):
        arrow(ax, (start, y0), (start, y0 + 34), (end, y1 - 40), (end, y1), color=NET[net], lw=3)
        text(ax, end + offset, y0 + 49, f"net {net}'s division", color=NET[net], ha=ha)
    for x, net, peer, when, which in ((LEFT, 1, 2, "first", "net 2"), (RIGHT, 2, 1, "then", "updated net 1")):
        box(ax, (x, y1, COL, 84), face=NET_TINT[net], edge=NET[net])
        title(ax, x + COL / 2, y1 + 24, f"{when}: train net {net} on {bold('X', peer)}, {bold('U', peer)}", NET[net])
        chip(ax, x + COL / 2, y1 + 58, 256, f"peer: {which}, frozen", peer)
    arrow(ax, (LEFT + COL, y1 + 42), (RIGHT, y1 + 42), color=NET[1], lw=3)


def mixmatch(ax, y):
    """lambda * rows + (1 - lambda) * shuffled rows = mixed rows, as three strips of squares."""
    box(ax, (LEFT, y, RIGHT + COL - LEFT, 112), lw=1.4)
    title(ax, LEFT + 18, y + 23, "MixMatch", ha="left")
    text(ax, LEFT + 114, y + 23, "mixup of labeled and unlabeled rows together, images and targets", ha="left")
    rows, shuffled, side, pitch = "XXXXUUUU", "UXUUXXUX", 18, 20
    for x, sign, gap, main, partner, label in (
        (94, r"$\lambda$", 18, rows, rows, "all rows"),
        (366, r"$+\;(1-\lambda)$", 48, shuffled, shuffled, "all rows, shuffled"),
        (604, "=", 38, rows, shuffled, r"mixed rows ($\lambda \geq 0.5$)"),
    ):
        text(ax, x - gap, y + 56, sign, 16)
        for i, (m, p) in enumerate(zip(main, partner, strict=True)):
            x0, y0, x1, y1 = x + i * pitch, y + 47, x + i * pitch + side, y + 47 + side
            ax.add_patch(Rectangle((x0, y0), side, side, fc=ROW[m], zorder=3))
            ax.add_patch(Polygon([(x1, y0 + 4), (x1, y1), (x0 + 4, y1)], fc=ROW[p], zorder=4))
        text(ax, x + 4 * pitch - 1, y + 89, label, color=SOFT)


def loss_row(ax, y):
    box(ax, (LEFT, y, 580, 82), lw=1.4)
    title(ax, LEFT + 16, y + 19, "loss =", ha="left")
    for x, sign, gap, term, *lines in (
        (182, "", 0, "$L_x$", "cross-entropy", "on labeled rows"),
        (338, "+", 78, r"$\lambda_u\,L_u$", "squared error", "on unlabeled rows"),
        (518, "+", 94, "penalty", "mean prediction kept", "near uniform prior"),
    ):
        text(ax, x - gap, y + 19, sign, 16)
        title(ax, x, y + 19, term)
        for i, s in enumerate(lines):
            text(ax, x, y + 42 + 21 * i, s, color=SOFT)
    arrow(ax, (LEFT + 580, y + 41), (660, y + 41))
    chip(ax, 726, y + 41, 132, "update net 1", 1, size=16)


def step_panel(ax, top):
    """One training step of net 1, with net 2 as its peer."""
    box(ax, (14, top, WIDTH - 28, 586), edge=NET[1], r=12, z=1)
    title(ax, LEFT, top + 26, "One training step of net 1", NET[1], ha="left", size=18)
    text(ax, RIGHT + COL, top + 27, "(for net 2, swap 1 and 2)", color=SOFT, ha="right")
    batch, nets, target, mix, loss = (top + dy for dy in (50, 146, 186, 294, 486))
    a, b, c, x2, u2 = LEFT + COL / 2, RIGHT + COL / 2, LEFT + 290, bold("X", 2), bold("U", 2)
    card(ax, (LEFT, batch, COL, 56), "X", f"labeled batch from {x2}", "two views, noisy label $y$, weight $w_2$")
    card(ax, (RIGHT, batch, COL, 56), "U", f"unlabeled batch from {u2}", "two views, label dropped")
    for x, net, w, label in ((a, 1, 70, "net 1"), (b - 78, 1, 70, "net 1"), (b + 78, 2, 126, "peer: net 2")):
        arrow(ax, (x, batch + 56), (x, nets - 14))
        arrow(ax, (x, nets + 14), (x, target))
        chip(ax, x, nets, w, label, net)
    arrow(ax, (LEFT + 60, batch + 56), (LEFT + 60, target))
    text(ax, LEFT + 69, nets, "$y$, $w_2$", ha="left")
    refine = r"$w_2\,y + (1 - w_2)\,p$, then sharpen", "$p$: net 1's mean over both views"
    guess = "mean prediction of both nets", "over both views, then sharpen"
    card(ax, (LEFT, target, COL, 80), "X", "co-refine", *refine, tint=False)
    card(ax, (RIGHT, target, COL, 80), "U", "co-guess", *guess, tint=False)
    for x, y0, y1 in ((a, target + 80, mix), (b, target + 80, mix), (c, mix + 112, mix + 138), (c, mix + 166, loss)):
        arrow(ax, (x, y0), (x, y1))
    mixmatch(ax, mix)
    chip(ax, c, mix + 152, 70, "net 1", 1)
    loss_row(ax, loss)


def main():
    plt.switch_backend("Agg")
    fig = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=200)
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0), frameon=False, xticks=[], yticks=[])
    box(ax, (14, 14, WIDTH - 28, 44), face=PANEL, edge="none", r=12)
    title(ax, LEFT, 36, "Warm-up", ha="left", size=18)
    text(ax, LEFT + 106, 36, "each net trains on all samples with their noisy labels (cross-entropy)", ha="left")
    arrow(ax, (WIDTH / 2, 58), (WIDTH / 2, 84))
    epoch_panel(ax, 84)
    funnel = [(LEFT + 8, 598), (LEFT + COL - 8, 598), (WIDTH - 26, 666), (26, 666)]  # from "train net 1" to its step
    ax.add_patch(Polygon(funnel, fc=NET_TINT[1], zorder=1))
    step_panel(ax, 666)
    fig.canvas.draw()
    image = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3])
    image.quantize(128).save(Path(__file__).with_name("framework.png"), optimize=True)  # a palette: a third of the size


if __name__ == "__main__":
    main()
