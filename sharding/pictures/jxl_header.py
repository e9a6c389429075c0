"""The size that a JPEG XL file declares, read without decoding it.

The plug-in decodes the whole picture when it opens a file, so a limit on pixels must be asked before. Nothing else of
the header is read. Source: ISO/IEC 18181-1 (codestream: SizeHeader) and 18181-2 (container: boxes).
"""

_CODESTREAM = b"\xff\x0a"
_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
_SIZE_BITS = (9, 13, 18, 30)
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def is_jxl(data: bytes) -> bool:
    """Tell whether these are the bytes of a JPEG XL file, bare or in a container."""
    return data.startswith((_CODESTREAM, _CONTAINER))


def jxl_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels, before orientation. Raises ValueError when the header is cut or wrong."""
    codestream = data if data.startswith(_CODESTREAM) else _codestream_in_boxes(data)
    if not codestream.startswith(_CODESTREAM):
        raise ValueError("no JPEG XL codestream")
    bits = _Bits(codestream[2:18])
    is_small = bits.read(1)
    height = _read_side(bits, is_small)
    ratio = bits.read(3)
    if ratio == 0:
        return _read_side(bits, is_small), height
    numerator, denominator = _RATIOS[ratio - 1]
    return height * numerator // denominator, height


def _read_side(bits: "_Bits", is_small: int) -> int:
    return 8 * (bits.read(5) + 1) if is_small else 1 + bits.read(_SIZE_BITS[bits.read(2)])


def _codestream_in_boxes(data: bytes) -> bytes:
    start = 0
    while start + 8 <= len(data):
        size, kind, header = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8], 8
        if size == 1:
            size, header = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):  # a partial codestream has a number of four bytes before it
            first = start + header + (4 if kind == b"jxlp" else 0)
            return data[first : first + 18]
        if size < header:
            break  # 0: up to the end of the file; else damaged
        start += size
    return b""


class _Bits:
    """Numbers of any width from bytes, lowest bit first."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "little")
        self._left = 8 * len(data)

    def read(self, count: int) -> int:
        if count > self._left:
            raise ValueError("the JPEG XL header is cut")
        number = self._value & ((1 << count) - 1)
        self._value >>= count
        self._left -= count
        return number
