"""Everything the doctor can say: how serious it is, what is found, the most likely cause, and the cure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minidet.inspection.findings import MUST_FIX, NOTE, SHOWN, WARNING, Finding

MERGED = "two exports were put together without numbering their entries anew"

ADVICE = {
    # The json.
    "json-unreadable": (MUST_FIX, "{file} is not json that can be read: {error}",
        "the file was cut off, edited by hand, or is something else", "export it again"),
    "lists-missing": (MUST_FIX, "{file} has no list called {names}",
        "this is no instances_*.json file, but captions, detections or another tool's format",
        "export the data set as COCO json: an object with images, annotations and categories"),
    "entries-malformed": (MUST_FIX, "{n} entries of {file} cannot be used: {problem}",
        "a converter that wrote numbers as text, or left a field out",
        "write the field as COCO does, or remove these entries"),
    "file-name-unsafe": (MUST_FIX, "{n} file names of {file} lead out of the image folder",
        "the json was written with the paths of another machine",
        "make every file_name a path below the image folder, without / at its beginning and without .."),
    # Ids.
    "image-id-twice": (MUST_FIX, "{n} image ids of {file} are there before", MERGED,
        "number the images, and the image_id of their boxes"),
    "file-name-twice": (WARNING, "{n} file names of {file} are there before", MERGED,
        "keep one entry an image, and move its boxes to it"),
    "annotation-id-twice": (MUST_FIX, "{n} annotation ids of {file} are there before", MERGED,
        "number the annotations 1, 2, 3, ..."),
    "category-id-twice": (MUST_FIX, "{n} category ids of {file} are there before", MERGED,
        "give every class an id of its own, and its annotations with it"),
    "category-name-twice": (MUST_FIX, "{n} class names of {file} are there before", MERGED,
        "one entry a class: merge the ids of equal names"),
    "image-id-unknown": (MUST_FIX, "{n} of {of} annotations of {file} have an image_id that no image has",
        "{cause}", "{fix}"),
    "category-id-unknown": (MUST_FIX, "{n} of {of} annotations of {file} have a category_id that no category has",
        "{cause}", "{fix}"),
    "category-ids-sparse": (NOTE, "{n} category ids of {file} go from {first} to {last}", "COCO's own have gaps too",
        "nothing: minidet counts classes 0, 1, 2 in the order of their ids"),
    # Boxes.
    "boxes-normalised": (MUST_FIX, "{n} of {of} boxes of {file} lie in 0..1",
        "they are fractions of the image, as YOLO writes them",
        "multiply x and width by the image's width, y and height by its height; YOLO's x, y are centres besides"),
    "boxes-are-corners": (MUST_FIX, "{n} of {of} boxes of {file} fit as {order}, not as x, y, width, height",
        "corners were written where COCO has a corner and two sides", "{write}"),
    "boxes-negative": (MUST_FIX, "{n} of {of} boxes of {file} have a negative width or height",
        "the box was drawn from right to left or upwards, or corners were exchanged",
        "where width < 0: x += width, width = -width; the same with y and height"),
    "boxes-outside": (MUST_FIX, "{n} of {of} boxes of {file} reach out of their image by more than 2 px", "{cause}",
        "correct the boxes, or the image's width and height in the json"),
    "boxes-empty": (MUST_FIX, "{n} of {of} boxes of {file} have no area",
        "a click without a drag while annotating, or rounding of very small boxes", "remove these annotations"),
    "boxes-twice": (WARNING, "{n} of {of} boxes of {file} repeat one of their image and class",
        "annotations were merged or saved twice", "remove the copies: each counts as an object of its own in AP"),
    "boxes-between-classes": (WARNING, "{n} of {of} boxes of {file} are there again with another class",
        "annotations of two people or two passes were put together, or an object has several labels",
        "keep the right class of each: minidet takes them for several objects in one place"),
    "boxes-of-whole-images": (WARNING, "{n} of {of} boxes of {file} are their whole image",
        "labels of images were written as boxes, or a converter lost the boxes",
        "annotate the objects; a detector cannot learn where things are from boxes that are everywhere the same"),
    "boxes-in-a-corner": (WARNING, "{n} boxes of {file} all lie in the left {wide:.0%} and upper {high:.0%} of their "
        "images", "{cause}", "multiply the boxes by the images' size, divided by the size they were drawn at"),
    "areas-differ": (WARNING, "{n} of {of} areas of {file} are not those of their boxes", "{cause}",
        "leave area out, or write width * height or the outline's area: COCO sorts objects into sizes by it"),
    "boxes-misread": (MUST_FIX, "the outlines in {n} images of {file} are where boxes would be {reading}, not where "
        "they are ({errors:.0f} standard errors)",
        "boxes or pictures were mirrored, turned, resized or renamed alone",
        "look at these images with their boxes; then write the boxes {reading}, or undo what was done to the pictures"),
    "boxes-fit-nothing": (WARNING, "the boxes of {n} images of {file} fit their pictures no better than other pictures",
        "boxes and pictures were shuffled, or the objects have no visible outlines",
        "look at some images with their boxes: file_name and image_id must be of the same picture"),
    # Objects and classes.
    "nothing-to-learn": (MUST_FIX, "{n} images of {file} without a single object, but {crowds} crowds",
        "every annotation is a crowd (iscrowd 1), or the annotations are of another file",
        "set iscrowd to 0 where a box holds one object, or export the boxes again"),
    "images-without-objects": (NOTE, "{n} of {of} images of {file} have no object",
        "there are none, or these images were not annotated",
        "nothing, if there are none: they teach what background is; else annotate or remove them"),
    "class-without-objects": (WARNING, "{n} of {of} classes of {file} have no object",
        "a split that was cut too thin, or a class list taken from elsewhere",
        "add images of these classes, or remove the classes; what is not shown is not learned"),
    "class-with-few-objects": (NOTE, "{n} of {of} classes of {file} have fewer than {few} objects",
        "rare classes, or a split that was cut too thin", "add images of these classes, or expect little of them"),
    "class-dominates": (WARNING, "{share:.1%} of the objects of {file} are {name!r}, one of {of} classes",
        "the split was drawn from few scenes, or a converter gave most objects one class",
        "check the class ids; if it is so, add images of the other classes, and judge by AP per class"),
    "classes-reordered": (MUST_FIX, "{file} and {other} have the same classes in another order",
        "ids were given anew by each export, in the order in which classes turned up",
        "give the categories of {file} ids in the order {order}"),
    "classes-differ": (MUST_FIX, "{file} and {other} do not have the same classes", "{cause}", "{fix}"),
    # Pictures.
    "images-missing": (MUST_FIX, "{n} of {of} images of {file} are not in {folder}",
        "{cause}",
        "{cure}put them back, or remove their entries and annotations from the json"),
    "images-unreadable": (MUST_FIX, "{n} of {of} images opened of {file} cannot be read",
        "the file is truncated or damaged, or no picture",
        "copy it again from its source, or remove its entry and annotations from the json"),
    "images-too-large": (MUST_FIX, "{n} of {of} images opened of {file} have more pixels than is safe to decode",
        "scans or maps that were never cut, or a damaged header",
        "cut them into tiles with their boxes, or shrink both"),
    "images-blank": (WARNING, "{n} of {of} images opened of {file} are of one colour as training sees them",
        "a black frame, a failed export, or 16-bit pictures whose values stay below 256: the upper 8 bits are used",
        "export them again, 16-bit pictures stretched to the whole range; else remove them"),
    "image-size-exchanged": (MUST_FIX, "{n} of {of} images opened of {file} have width and height exchanged",
        "the json was written as height x width, or the picture was rotated after it was annotated",
        "exchange width and height in the json and look whether the boxes fit; else rotate the picture back"),
    "image-size-differs": (MUST_FIX, "{n} of {of} images opened of {file} have another size than the json says",
        "they were resized or cropped after they were annotated",
        "restore the original files, or multiply boxes, width and height by new size / old size"),
    "exif-ignored": (WARNING, "{n} of {of} images opened of {file} are turned by EXIF, but not their boxes",
        "the annotation tool ignored EXIF",
        "nothing for minidet, which uses them as annotated; for every other tool rewrite them without EXIF"),
    "exif-ambiguous": (WARNING, "{n} of {of} images opened of {file} have an EXIF orientation that their size hides",
        "turned by 180 degrees, mirrored, or square: nobody can tell whether the boxes are of the turned image",
        "look at some with their boxes; rewrite the files upright and without EXIF. minidet turns them upright"),
    "exif-upright": (NOTE, "{n} of {of} images opened of {file} are stored turned and annotated upright",
        "a camera held upright", "nothing: minidet turns them; a tool that ignores EXIF would not"),
    "image-modes": (NOTE, "{n} of {of} images opened of {file} are not RGB",
        "grey, palette, transparent or 16-bit pictures",
        "nothing: they become RGB, on white, the upper 8 of 16 bits"),
    "images-in-two-splits": (MUST_FIX, "{n} images are in more than one split, byte for byte",
        "the split was drawn from a folder that held copies, or over annotations instead of images",
        "remove them from one of the splits: validation would measure what was learned by heart"),
    "images-twice": (WARNING, "{n} images are copies of another one of their split, byte for byte",
        "video frames that stand still, or a folder merged twice", "keep one of each, with the boxes of all"),
    # Anchors.
    **dict.fromkeys(("objects-too-small", "objects-too-elongated", "objects-between-anchors"), (NOTE,
        "the best anchor of {low:.1%} of the objects has an IoU below {least:g}: these count as background {then}; "
        "{high:.1%} reach {most:g}",
        "of those that do not, {small:,} are smaller than {area:,.0f} px² after resizing, {long:,} longer than "
        "{length:.1f} : 1, {rest:,} lie between anchors", "{fix}")),
    "levels-unused": (NOTE, "levels above P{level} have the best anchor of next to no object",
        "there are no objects that large", "{fix} saves their work"),
    # The training.
    "refused": (MUST_FIX, "training refuses to begin: {error}", "see above", "correct what it names"),
    "first-loss": (WARNING, "the first class loss is {found:.4g}; a network that says its prior everywhere has "
        "{expected:.4g}", "the class output's bias does not hold the prior, or the features are far too large",
        "start with a fresh class output; check the images' normalisation (model.preprocess) and the norms"),
    "not-learned-by-heart": (WARNING, "{images} images were not learned by heart: in {steps} steps the loss went from "
        "{first:.3f} to {last:.3f}, not to {share:.0%}",
        "the learning rate does not suit the network; a frozen norm suits only the weights it was trained with",
        "start from pretrained weights (--init), choose another rate (--set lr=...), or a norm that learns "
        "(--set model.backbone.norm.name=group)"),
    "memory": (WARNING, "training will need {peak:.1f} of {available:.1f} GiB", "{images} images are run at once",
        "{fix}"),
}  # fmt: skip


def finding(
    code: str, rows: Sequence | int = 1, describe: Callable[[int], object] | None = None, *,
    severity: str = "", **words,
) -> Finding:  # fmt: skip
    """The advice of this code for so many rows, the first of them named by `describe`."""
    usual, *texts = ADVICE[code]
    count = rows if isinstance(rows, int) else len(rows)
    where = () if describe is None else tuple(str(describe(row)) for row in rows[:SHOWN])
    what, cause, fix = (text.format(n=count, **words) for text in texts)
    return Finding(severity or usual, code, what, cause, fix, where, count)
