"""What this machine has of CUDA, asked of the driver itself: standard library only, so that any program may look."""

import ctypes
from dataclasses import dataclass

DRIVER = "libcuda.so.1"

PACKAGES = {"trt": ("cuda-bindings",)}
"""What running on a device takes, besides TensorRT; looking at it takes nothing. See `dfssm.base.extras`."""

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Device:
    """One GPU: its name, and its compute capability as `--sm` writes it (8.6 is 86)."""

    name: str
    sm: int


def devices() -> tuple[list[Device], str]:
    """The GPUs that CUDA lists, in its order; where there is none, also why (else "")."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return [], f"there is no CUDA driver ({DRIVER})"
    count = ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        return [], f"the CUDA driver finds no GPU (error {code})" if code else "the CUDA driver finds no GPU"
    return [_device(driver, index) for index in range(count.value)], ""


def driver() -> str:
    """The newest CUDA that the driver knows, as 13.0; "none" where there is no driver."""
    try:
        library = ctypes.CDLL(DRIVER)
    except OSError:
        return "none"
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _device(driver: ctypes.CDLL, index: int) -> Device:
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), index)
    number = ctypes.c_int()
    capability = []
    for attribute in (_MAJOR, _MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, index)
        capability.append(number.value)
    return Device(name.value.decode(errors="replace"), 10 * capability[0] + capability[1])
