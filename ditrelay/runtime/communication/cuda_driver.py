"""The few calls of the CUDA driver that torch has no public way to: device memory shared between processes.

The driver's library and these calls are the same under every CUDA release that torch is built for.
"""

from __future__ import annotations

import ctypes

import torch

_LIBRARY = "libcuda.so.1"
_LAZY_ENABLE_PEER_ACCESS = 1
_HANDLE_BYTES = 64


class CudaDriverError(RuntimeError):
    """A call of the driver failed; the way out is in the message too."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; --transfer-backend torch does without CUDA IPC")


class _IpcHandle(ctypes.Structure):
    """The driver takes it by value."""

    _fields_ = [("opaque", ctypes.c_ubyte * _HANDLE_BYTES)]


class CudaDriver:
    """Works in the context that torch uses for ``device``: call ``bind`` first on every thread.

    Addresses are device addresses, sizes are bytes.

    Raises:
        CudaDriverError: here and in every method; names the call and the driver's reason.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise CudaDriverError(f"{_LIBRARY} can not be loaded: {error}") from error
        number = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(number), ctypes.c_int(device.index))
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), number)

    def bind(self) -> None:
        """Make the device's context that of this thread."""
        self._call("cuCtxSetCurrent", self._context)

    def export(self, address: int) -> tuple[bytes, int]:
        """What another process needs to open the allocation around ``address``: its handle, and the offset in it."""
        base, handle = ctypes.c_uint64(), _IpcHandle()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), None, ctypes.c_uint64(address))
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle), address - base.value

    def open(self, handle: bytes) -> int:
        """Map another process's allocation; every call needs a ``close``."""
        base, flags = ctypes.c_uint64(), ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(base), _IpcHandle.from_buffer_copy(handle), flags)
        return base.value

    def close(self, base: int) -> None:
        """Undo one ``open``. No copy from there may be under way."""
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(base))

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Start to copy, in the order of the CUDA stream ``stream``; between two devices by the copy engines."""
        addresses = ctypes.c_uint64(target), ctypes.c_uint64(source)
        self._call("cuMemcpyAsync", *addresses, ctypes.c_size_t(nbytes), ctypes.c_void_p(stream))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)  # looked up once: ctypes keeps it
        if code != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise CudaDriverError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")
