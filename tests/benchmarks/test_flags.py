"""What all benchmarks refuse."""

import pytest

from benchmarks import (
    accuracy_pairs,
    bench_checkpoint,
    bench_cifar,
    bench_images,
    bench_issues,
    bench_jobs,
    bench_scale,
)


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (bench_cifar, "--samples 40 --labeled 40"),
        (bench_cifar, "--labeled 0"),
        (bench_cifar, "--test_samples 0"),
        (bench_images, "--labeled 1"),
        (bench_images, "--images 1"),
        (bench_issues, "--seeds 0"),
        (bench_jobs, "--jobs 0"),
        (bench_jobs, "--samples 60 --labeled 60"),
        (bench_checkpoint, "--repeats 0"),
        (bench_checkpoint, "--epoch_seconds -1"),
        (bench_scale, "--sizes 10"),
        (bench_scale, "--batch_size 0"),
        (accuracy_pairs, "--ways blind paper="),
    ],
)
def test_sizes_without_work_are_refused(module, flags):
    """Else it ends in a division by zero after minutes, or waits for processes that do not come."""
    with pytest.raises(SystemExit) as ended:
        module.parse_args(flags.split())
    assert ended.value.code == 2
