"""Normalize a COCO annotation file, as its exporter wrote it, to the format's definition.

Exporters fill the fields in different ways. `read_document` checks all of them: a value with one meaning is read or
repaired, with one warning for each kind of repair; a value with none or two is refused with a message. The result has
integer ids (annotations numbered from 1, because pycocotools takes an annotation 0 for no match, and the last of equal
ids), finite numbers, boxes inside their images, an area for each annotation, and `iscrowd` 0 or 1.
"""

from __future__ import annotations

import ast
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clove_hub.documents import read_json

from .values import label, number, numbers, some, whole

log = logging.getLogger(__name__)

Row = dict[str, Any]
_SECTIONS = ("images", "annotations", "categories")


Dropped = defaultdict[str, list[Any]]
"""What was left out or repaired: the ids of the annotations by reason."""


def warn(dropped: Dropped, path: Path) -> None:
    """Log one warning for each reason."""
    for reason, ids in dropped.items():
        log.warning("%s: %d annotations %s (ids %s)", path, len(ids), reason, some(ids))


@dataclass(frozen=True)
class Document:
    """Rows with the fields of COCO's definition, and any other fields that the exporter wrote."""

    images: list[Row]
    annotations: list[Row]
    """`name` is the id in the file, for messages. A box without area is None. A segmentation is RLE, a list of polygons
    with at least three corners, or the file's value if it is neither."""
    categories: list[Row]


def read_document(path: Path) -> Document:
    """Read and repair an annotation file.

    Raises:
        ValueError: it cannot be read, or contradicts itself; the message names the file and the annotation.
    """
    return repaired(read_json(path), path)


def read_images(path: Path) -> tuple[list[Row], list[Row]]:
    """The image rows and category rows of a file that may have no annotations, as for COCO's test images.

    Raises:
        ValueError: as `read_document`.
    """
    sections = read_json(path)
    _require_lists(sections, ("images", "categories"), path)
    return _images(sections["images"], path)[0], _categories(sections["categories"], path)[0]


def repaired(sections: Any, path: Path) -> Document:
    """Repair the three lists of a document.

    Args:
        path: the file, for messages.

    Raises:
        ValueError: as `read_document`.
    """
    _require_lists(sections, _SECTIONS, path)
    if not sections["annotations"]:
        raise ValueError(f"{path} has no annotations: there is nothing to train on or to score")
    images, image_ids = _images(sections["images"], path)
    categories, category_ids = _categories(sections["categories"], path)
    dropped: Dropped = defaultdict(list)
    sizes = {row["id"]: (row["height"], row["width"]) for row in images}
    _refuse_other_boxes(sections["annotations"], {key: sizes[id] for key, id in image_ids.items()}, path)
    annotations = []
    for place, row in enumerate(sections["annotations"], start=1):
        name = row.get("id")
        if _key(name) is None:
            raise ValueError(f"{path}: an annotation of image {row.get('image_id')!r} has no integer id")
        where = f"{path}: annotation {name}"
        image, category = image_ids.get(_key(row.get("image_id"))), category_ids.get(_key(row.get("category_id")))
        if image is None:
            raise ValueError(f"{where} belongs to image {row.get('image_id')!r}, which is not among the file's images")
        if category is None:
            raise ValueError(
                f"{where} is of category {row.get('category_id')!r}, which is not among the file's categories"
            )
        facts = {"id": place, "name": name, "image_id": image, "category_id": category}
        annotations.append(row | facts | _annotation(row, where, sizes[image], dropped))
    names = [_key(row["name"]) for row in annotations]
    if twice := len(names) - len(set(names)):
        log.warning("%s: %d annotations have the id of another one; all get new ids", path, twice)
    things = {(r["image_id"], r["category_id"], r["iscrowd"], *(r["bbox"] or [r["id"]])) for r in annotations}
    if same := len(annotations) - len(things):
        log.warning("%s: %d annotations repeat image, category and box of another one", path, same)
    warn(dropped, path)
    return Document(images, annotations, categories)


# ---- images and categories -------------------------------------------------------------------------------------------


def _key(identity: Any) -> int | str | None:
    """The normalized form of an id: 7, 7.0 and "7" are the same id."""
    found = whole(identity)
    return found if found is not None else identity if isinstance(identity, str) and identity.strip() else None


def _require_lists(sections: Any, keys: Sequence[str], path: Path) -> None:
    """Raise ValueError unless each section is a list of rows."""
    for key in keys:
        rows = sections.get(key) if isinstance(sections, Mapping) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} has no list of {key}: expected COCO's format, with {', '.join(_SECTIONS)}")


def _images(rows: Sequence[Row], path: Path) -> tuple[list[Row], dict[int | str | None, int]]:
    """The rows with integer ids, and the mapping from the ids in the file."""
    found: dict[int | str, Row] = {}
    for row in rows:
        key, name = _key(row.get("id")), row.get("file_name")
        if key is None or not isinstance(name, str) or not name.strip():
            raise ValueError(f"{path}: the image {str(row)[:200]} lacks an integer id or a file_name")
        size = {side: whole(row.get(side)) for side in ("height", "width")}
        if not all(side is not None and side > 0 for side in size.values()):
            raise ValueError(
                f"{path}: image {row['id']} ({name}) has height {row.get('height')!r} and width {row.get('width')!r}; expected "
                "whole numbers above 0"
            )
        if key in found:
            raise ValueError(f"{path}: two images have the id {row['id']}")
        found[key] = row | size
    return _numbered(found, path, "images")


def _categories(rows: Sequence[Row], path: Path) -> tuple[list[Row], dict[int | str | None, int]]:
    found: dict[int | str, Row] = {}
    for row in rows:
        key, name = _key(row.get("id")), label(row.get("name"))
        if key is None or not name:
            raise ValueError(f"{path}: the category {str(row)[:200]} lacks an integer id or a name")
        if key in found:
            raise ValueError(f"{path}: two categories share an id, {row['id']}")
        found[key] = row | {"name": name}
    if not found:
        raise ValueError(f"{path}: it has no categories")
    numbered, ids = _numbered(found, path, "categories")
    return sorted(numbered, key=lambda row: row["id"]), ids


def _numbered(rows: Mapping[int | str, Row], path: Path, what: str) -> tuple[list[Row], dict[int | str | None, int]]:
    """The rows with their ids, or with numbers from 1 if an id is not a number; and the mapping from the ids."""
    ids: dict[int | str | None, int] = {key: key for key in rows if isinstance(key, int)}
    if len(ids) < len(rows):
        log.warning(
            "%s: ids of %s are not numbers (such as %r); they are numbered from 1", path, what, next(iter(rows))
        )
        ids = {key: place for place, key in enumerate(rows, start=1)}
    return [row | {"id": ids[key]} for key, row in rows.items()], ids


def unused_parents(document: Document) -> set[int]:
    """Ids of categories without annotations that are only the others' parent, as Roboflow adds one."""
    used = {row["category_id"] for row in document.annotations}
    parents = {row.get("supercategory") for row in document.categories if row["id"] in used}
    return {
        row["id"]
        for row in document.categories
        if row["id"] not in used and row["name"] in parents and row.get("supercategory") in (None, "", "none")
    }


# ---- annotations -----------------------------------------------------------------------------------------------------


def _annotation(row: Row, where: str, size: tuple[int, int], dropped: Dropped) -> Row:
    """The repaired fields of an annotation."""
    height, width = size
    name = row["id"]
    crowd = _flag(row.get("iscrowd"), where, "iscrowd")
    forgiven = crowd or _flag(row.get("ignore"), where, "ignore")
    if forgiven and not crowd:
        dropped["are marked `ignore` and neither trained on nor scored"].append(name)
    box = numbers(row.get("bbox"))
    if box is None or len(box) != 4:
        raise ValueError(f"{where} has the bbox {row.get('bbox')!r}; expected [x, y, width, height] in pixels")
    x, y, w, h = box
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    found: list[float] | None = None
    if w <= 0 or h <= 0 or x1 <= x0 or y1 <= y0:
        dropped["have a box that covers nothing of the image and are left out"].append(name)
    elif (x0, y0, x1, y1) == (x, y, x + w, y + h):
        found = box
    else:
        found = [x0, y0, x1 - x0, y1 - y0]
        if max(x0 - x, y0 - y, x + w - x1, y + h - y1) > 1:
            dropped["have a box that reaches beyond the image and is cut at its edge"].append(name)
    segmentation = _segmentation(row.get("segmentation"), where, size, name, dropped)
    fields: Row = {"iscrowd": int(forgiven), "bbox": found, "segmentation": segmentation}
    if found is not None:
        fields["area"] = _area(row.get("area"), found, segmentation, name, dropped)
    if (points := row.get("keypoints")) is not None:
        fields["keypoints"] = _keypoints(points)
        fields["num_keypoints"] = sum(seen > 0 for seen in fields["keypoints"][2::3])
    return fields


def _flag(value: Any, where: str, what: str) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    if whole(value) not in (0, 1):
        raise ValueError(f"{where} has {what} {value!r}; expected 0 or 1")
    return whole(value) == 1


def _segmentation(found: Any, where: str, size: tuple[int, int], name: Any, dropped: Dropped) -> Any:
    """RLE or polygons with at least three corners; None without one, and the unchanged value if it is neither."""
    if isinstance(found, dict):
        return _rle(found, where, size)
    if not isinstance(found, list):
        return found
    if found and not any(isinstance(polygon, list) for polygon in found):
        found = [found]  # one polygon without its own list
    whole_ones = []
    for polygon in found:
        if isinstance(polygon, list) and polygon and all(isinstance(corner, list) for corner in polygon):
            polygon = [value for corner in polygon for value in corner]  # [[x, y], ...]
        values = numbers(polygon)
        if values is None:
            return found
        if len(values) >= 6 and len(values) % 2 == 0:
            whole_ones.append(values)
    if whole_ones and len(whole_ones) < len(found):
        dropped["lose a polygon with fewer than three corners or an odd number of coordinates"].append(name)
    return whole_ones


def _rle(found: Mapping[str, Any], where: str, size: tuple[int, int]) -> Row:
    sides, counts = numbers(found.get("size")), found.get("counts")
    if sides != list(size) or not isinstance(counts, list | str):
        raise ValueError(
            f"{where} has a mask in RLE of size {found.get('size')!r}; expected that of its image, "
            f"{list(size)}, and `counts`"
        )
    if isinstance(counts, str) and counts[:2] in ("b'", 'b"'):  # the repr of Python bytes
        try:
            counts = ast.literal_eval(counts).decode("ascii")
        except (ValueError, SyntaxError, UnicodeDecodeError):
            counts = ""
    runs = _runs(counts) if isinstance(counts, str) else [-1 if (run := whole(it)) is None else run for it in counts]
    total = size[0] * size[1]
    if min(runs, default=-1) < 0 or sum(runs) != total:
        raise ValueError(f"{where} has a mask in RLE whose counts do not add up to the {total} pixels of its image")
    return {"size": list(size), "counts": counts if isinstance(counts, str) else runs}


def _runs(text: str) -> list[int]:
    """The run lengths in a compressed RLE: six bits per character, differences to the last but one; [] if invalid."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs if not shift else []


def _area(given: Any, box: Sequence[float], segmentation: Any, name: Any, dropped: Dropped) -> float:
    """The area in the file; if implausible, the area of the polygons or of the box."""
    whole_box = box[2] * box[3]
    area = number(given)
    if area is not None and 0 < area < 0.99 * whole_box:
        return area
    inside = whole_box
    if isinstance(segmentation, list) and segmentation and numbers(segmentation[0]):
        inside = min(sum(map(_shoelace, segmentation)), whole_box) or whole_box
    if area is None or area <= 0:
        return inside
    if area > 2 * whole_box + 4:  # rounding can make small areas exceed their box
        dropped["have an area greater than that of their box, and get that of their mask or box"].append(name)
        return inside
    if abs(area - whole_box) <= 0.01 * whole_box and inside < 0.95 * whole_box:
        dropped["have the area of their box, and get that of their polygons"].append(name)
        return inside
    return area


def _shoelace(polygon: Sequence[float]) -> float:
    xs, ys = polygon[::2], polygon[1::2]
    return abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2


def _keypoints(found: Any) -> list[float]:
    """x, y, visibility, ...; invisible keypoints may lack coordinates. Empty if invalid."""
    if not isinstance(found, list) or len(found) % 3:
        return []
    points: list[float] = []
    for x, y, seen in zip(found[::3], found[1::3], found[2::3], strict=True):
        visible = number(seen)
        place = (number(x), number(y)) if visible else (number(x) or 0.0, number(y) or 0.0)
        if visible is None or None in place:
            return []
        points += [*place, visible]  # type: ignore[list-item]
    return points


def _refuse_other_boxes(rows: Sequence[Row], sizes: Mapping[int | str | None, tuple[int, int]], path: Path) -> None:
    """Raise ValueError if boxes are x0, y0, x1, y1, fractions of the image, or those of another image."""
    corners = counted = beyond = 0
    largest = 0.0
    for row in rows:
        box, size = numbers(row.get("bbox")), sizes.get(_key(row.get("image_id")))
        if box is None or len(box) != 4 or size is None:
            continue
        counted += 1
        largest = max(largest, *box)
        x, y, a, b = box
        area = number(row.get("area"))
        fits = x < a <= size[1] + 1 and y < b <= size[0] + 1
        leaves = x + a > size[1] + 1 or y + b > size[0] + 1
        told = bool(area) and abs(area - (a - x) * (b - y)) <= 0.01 * area < abs(area - a * b)  # type: ignore[operator]
        corners += fits and (leaves or told)
        beyond += leaves
    if counted and corners * 4 >= counted:
        raise ValueError(
            f"{path}: {corners} of {counted} boxes leave their image as [x, y, width, height] and fit it as "
            "[x0, y0, x1, y1]: export them as COCO's format says, with width and height"
        )
    if beyond * 2 > counted:
        raise ValueError(
            f"{path}: {beyond} of {counted} boxes leave their image, as if made for images of another size. Export "
            "images and annotations together"
        )
    if counted and 0 < largest <= 1 and all(min(size) > 1 for size in sizes.values()):
        raise ValueError(
            f"{path}: no box has a number above 1, as if they were fractions of the image: export them in pixels, as COCO's "
            "format says"
        )
