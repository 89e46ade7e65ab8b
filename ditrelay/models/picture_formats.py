"""What files of pictures say of themselves, format by format. Nothing is decoded; no file takes long to look through.

Sources: PNG, W3C Recommendation (chunks, ``acTL``); ITU-T T.81 annex B (JPEG's markers); RFC 9649 (WebP's chunks);
Exif 2.3, 4.6.4 (the orientation); GIF89a; ISO/IEC 14496-12 and 23008-12 (boxes of AVIF and HEIC: ``ispe``, ``irot``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_PARTS = 100_000  # a picture of 100 megapixels has some ten thousand
_MAX_SIDE_PARTS = 4096  # parts that hold no pixels
_MAX_PACKED_TEXTS = 64  # of a PNG, each of which unpacks to a megabyte
_MAX_EXIF = 64  # segments of a JPEG, which decoders join to one
_MAX_ENTRIES = 512  # of an Exif directory
_MAX_SCANS = 100  # of a JPEG: encoders make some ten
_MAX_SCANNED = 1_500_000_000  # pixels in all scans: each scan goes over all of them
_ORIENTATION = 0x0112
_LYING = range(5, 9)  # orientations that swap height and width
_BOXES = frozenset({b"meta", b"iprp", b"ipco"})  # those that hold other boxes and lead to a picture's size


class Unreadable(Exception):
    """The file is more than a picture has to be; the message says of what there is too much."""


@dataclass
class Header:
    """Sizes in pixels as they are in the file; ``turned``: it is to be looked at with height and width swapped."""

    width: int = 0
    height: int = 0
    turned: bool = False
    animated: bool = False
    complete: bool = False


def _too_many(what: str, allowed: int) -> Unreadable:
    return Unreadable(f"it has too many {what}; allowed: {allowed}, so save it anew")


# ---------------------------------------------------------------- PNG


def read_png(content: bytes) -> Header:
    header, once, packed, others = Header(), set(), 0, 0
    for name, start, size in _png_chunks(content):
        if name == b"IHDR":
            header.width, header.height = struct.unpack_from(">II", content, start)
        elif name == b"IEND":
            header.complete = True
        elif name != b"IDAT":
            others += 1
            packed += name in (b"zTXt", b"iTXt")
            if others > _MAX_SIDE_PARTS:
                raise _too_many("parts beside its pixels", _MAX_SIDE_PARTS)
            if packed > _MAX_PACKED_TEXTS:
                raise _too_many("packed texts", _MAX_PACKED_TEXTS)
            if name in (b"iCCP", b"eXIf", b"acTL"):
                if name in once:
                    raise _too_many(f"parts {name.decode()}", 1)
                once.add(name)
                _read_png_chunk(header, name, content[start : start + size])
    return header


def _read_png_chunk(header: Header, name: bytes, data: bytes) -> None:
    if name == b"acTL":
        header.animated = struct.unpack_from(">I", data)[0] > 1
    elif name == b"eXIf":
        header.turned = _is_turned(data)


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and size of each chunk that is there as a whole, up to the last, ``IEND``."""
    place = len(_PNG)
    for _ in range(_MAX_PARTS):
        size, name = struct.unpack_from(">I4s", content, place)
        if place + size + 12 > len(content):
            return
        yield name, place + 8, size
        if name == b"IEND":
            return
        place += size + 12


# ---------------------------------------------------------------- JPEG


def read_jpeg(content: bytes) -> Header:
    header, place, exif = Header(), 2, 0
    for _ in range(_MAX_SIDE_PARTS):
        marker = content[place + 1]
        if content[place] != 0xFF:
            return header
        if marker == 0xFF:  # a byte to fill
            place += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # without a content
            place += 2
            continue
        size = struct.unpack_from(">H", content, place + 2)[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            header.height, header.width = struct.unpack_from(">HH", content, place + 5)
        elif marker == 0xE1 and content[place + 4 : place + 10] == b"Exif\0\0":
            exif += 1
            if exif == 1:
                header.turned = _is_turned(content[place + 10 : place + 2 + size])
            elif exif > _MAX_EXIF:
                raise _too_many("Exif segments", _MAX_EXIF)
        elif marker == 0xDA:
            # From here on the pixels, in which no end of image can be but the end. What follows that is nobody's.
            end = content.find(b"\xff\xd9", place + 2 + size)
            header.complete = end >= 0
            _check_scans(header, content, place, end)
            return header
        place += 2 + size
    raise _too_many("segments", _MAX_SIDE_PARTS)


def _check_scans(header: Header, content: bytes, place: int, end: int) -> None:
    """A scan may be a few bytes long and yet cost a pass over all pixels."""
    scans, allowed = 0, max(1, min(_MAX_SCANS, _MAX_SCANNED // max(1, header.width * header.height)))
    while place >= 0:
        scans += 1
        if scans > allowed:
            raise _too_many(f"scans of {header.width}x{header.height} pixels", allowed)
        place = content.find(b"\xff\xda", place + 2, max(0, end))


# ---------------------------------------------------------------- WebP


def read_webp(content: bytes) -> Header:
    header = Header(complete=len(content) >= 8 + struct.unpack_from("<I", content, 4)[0])
    place, exif = 12, False
    for _ in range(_MAX_SIDE_PARTS):
        if place + 8 > len(content):
            return header
        name, size = struct.unpack_from("<4sI", content, place)
        if name != b"EXIF":
            _read_webp_chunk(header, name, content, place + 8)
        elif not exif:  # of several only the first counts
            exif = True
            header.turned = _is_turned(content[place + 8 : place + 8 + size].removeprefix(b"Exif\0\0"))
        place += 8 + size + size % 2
    raise _too_many("chunks", _MAX_SIDE_PARTS)


def _read_webp_chunk(header: Header, name: bytes, content: bytes, start: int) -> None:
    if name == b"VP8X":
        flags, width, height = content[start], content[start + 4 : start + 7], content[start + 7 : start + 10]
        header.animated = bool(flags & 0x02)
        header.width, header.height = (int.from_bytes(side, "little") + 1 for side in (width, height))
    elif name == b"VP8L" and not header.width and content[start] == 0x2F:
        bits = struct.unpack_from("<I", content, start + 1)[0]
        header.width, header.height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif name == b"VP8 " and not header.width and content[start + 3 : start + 6] == b"\x9d\x01\x2a":
        sides = struct.unpack_from("<HH", content, start + 6)
        header.width, header.height = (side & 0x3FFF for side in sides)


# ---------------------------------------------------------------- GIF


def read_gif(content: bytes) -> Header:
    """Of an animation the first frame is the picture: so it is not said to be animated."""
    width, height = struct.unpack_from("<HH", content, 6)
    return Header(width, height, complete=b"," in content[13:])  # a frame begins; the rest shows when it is decoded


# ---------------------------------------------------------------- AVIF


def read_avif(content: bytes) -> Header:
    """The largest of the sizes that it tells: others are those of tiles and of thumbnails."""
    header = Header(animated=content[8:12] == b"avis", complete=True)
    for name, start, end in _boxes(content, 0, len(content)):
        if end > len(content):
            header.complete = False
        elif name == b"ispe":
            width, height = struct.unpack_from(">II", content, start + 4)
            if width * height > header.width * header.height:
                header.width, header.height = width, height
        elif name == b"irot":
            header.turned = bool(content[start] & 1)
    return header


def _boxes(content: bytes, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, begin of the data, and end of each box, and of the boxes in those that lead to sizes."""
    places = [(start, stop)]
    for _ in range(_MAX_SIDE_PARTS):
        while places and places[-1][0] + 8 > places[-1][1]:
            places.pop()
        if not places:
            return
        place, stop = places.pop()
        size, name = struct.unpack_from(">I4s", content, place)
        data = place + 8
        if size == 1:
            size, data = struct.unpack_from(">Q", content, data)[0], data + 8
        end = stop if size == 0 else place + size
        if end < data:
            return
        places.append((end, stop))
        yield name, data, end
        if name in _BOXES and end <= stop:
            places.append((data + (4 if name == b"meta" else 0), end))
    raise _too_many("boxes", _MAX_SIDE_PARTS)


# ---------------------------------------------------------------- Exif


def _is_turned(exif: bytes) -> bool:
    """What it is said to be is for the size alone: nothing depends on it."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return False
    try:
        place = struct.unpack_from(f"{order}I", exif, 4)[0]
        for number in range(min(_MAX_ENTRIES, struct.unpack_from(f"{order}H", exif, place)[0])):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, place + 2 + 12 * number)
            if tag == _ORIENTATION:
                return value in _LYING
    except struct.error:
        pass
    return False
