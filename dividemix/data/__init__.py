"""The images. `lists` says which files and labels there are, `check` what is wrong with them. `device` has the sets
that live on the device, augmentation included; larger images come through `stream`, whose `workers` read files by
`images` and keep them by `store`."""

from dividemix.data import check
from dividemix.data.check import usable
from dividemix.data.device import PAD, Batches, DeviceImages, plan_mixmatch
from dividemix.data.images import READING, BadImage, Views, opened, said, shown
from dividemix.data.lists import (
    IMAGE_SUFFIXES,
    Boundary,
    ImageList,
    Lines,
    absolute,
    bad_line,
    images_below,
    images_of_classes,
    is_image,
    list_folders,
    numbered_lines,
    read_lines,
    read_table,
    some,
)
from dividemix.data.stream import Pipeline, StreamedImages

__all__ = [
    "IMAGE_SUFFIXES",
    "PAD",
    "READING",
    "BadImage",
    "Batches",
    "Boundary",
    "DeviceImages",
    "ImageList",
    "Lines",
    "Pipeline",
    "StreamedImages",
    "Views",
    "absolute",
    "bad_line",
    "check",
    "images_below",
    "images_of_classes",
    "is_image",
    "list_folders",
    "numbered_lines",
    "opened",
    "plan_mixmatch",
    "read_lines",
    "read_table",
    "said",
    "shown",
    "some",
    "usable",
]
