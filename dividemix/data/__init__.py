"""The images. `lists` and `tables` read which files and labels there are, `corrections` what people decided on them;
`check` finds what is wrong with the files, `duplicates` equal images. `device` has the sets that live on the device,
and their augmentation. Larger images come through `stream`: its `workers` read files with `images`, and `store` keeps
them. `features` has numbers that a frozen network computes from each image."""

from dividemix.data import check, duplicates
from dividemix.data.check import usable
from dividemix.data.corrections import correct
from dividemix.data.device import PAD, DeviceImages, plan_mixmatch
from dividemix.data.features import HALF_FROM, FeatureSet
from dividemix.data.images import MISSING, READING, BadImage, Views, describe_changes, opened, shown
from dividemix.data.lists import (
    IMAGE_SUFFIXES,
    Boundary,
    ImageList,
    Lines,
    absolute,
    bad_line,
    ending,
    images_below,
    images_of_classes,
    is_hidden,
    is_image,
    list_folders,
    numbered_lines,
    printable,
    read_lines,
    some,
)
from dividemix.data.stream import Pipeline, StreamedImages
from dividemix.data.tables import TABLE_SUFFIXES, Table, find_files, has_splits, read_table
