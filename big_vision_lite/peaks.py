"""What devices can do at most, by their data sheets: what MFU is measured against."""

# Dense bfloat16 TFLOP/s of one JAX device by the data sheets of NVIDIA (H100, H200,
# GH200, A100, L4, L40S) and cloud.google.com/tpu/docs (v2 and v3: half a chip, the
# JAX device there is one core). The first name that starts `device_kind` counts.
PEAK_TFLOPS = (
    ("NVIDIA H200 NVL", 835.5),
    ("NVIDIA H200", 989.4),
    ("NVIDIA GH200", 989.4),
    ("NVIDIA H100 NVL", 835.5),
    ("NVIDIA H100 PCIe", 756.0),
    ("NVIDIA H100", 989.4),
    ("NVIDIA A100", 312.0),
    ("NVIDIA L40S", 362.0),
    ("NVIDIA L4", 121.0),
    ("TPU v6", 918.0),
    ("TPU v5 lite", 197.0),
    ("TPU v5e", 197.0),
    ("TPU v5", 459.0),
    ("TPU v4", 275.0),
    ("TPU v3", 61.5),
    ("TPU v2", 22.5),
)


def peak_flops(device_kind: str) -> float | None:
    """Returns the bfloat16 FLOP/s of a device by its data sheet, None if not known."""
    for name, tflops in PEAK_TFLOPS:
        if device_kind.startswith(name):
            return tflops * 1e12
    return None
