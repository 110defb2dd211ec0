"""Published figures of devices and links, each with its source.

`DEVICES` and `LINKS` are the names that `clients.system.fleet` takes. Peaks are
those that the source gives for dense products; a program reaches a share of
them (`utilisation`).
"""

from typing import NamedTuple

_MBIT = 1e6 / 8  # bytes
_KWH_A_GB = 3.6e6 / 1e9  # joules a byte


class Device(NamedTuple):
  """One kind of device.

  >>> DEVICES['orin_nano'].memory // 2**30
  8
  """

  title: str
  operations: float  # peak operations a second
  precision: str  # of these operations
  memory: int  # bytes
  watts: float | None  # under load; None: the source has no figure
  source: str


class Link(NamedTuple):
  """One kind of connection to the server.

  >>> LINKS['mobile'].up < LINKS['mobile'].down
  True
  """

  title: str
  down: float  # bytes a second to the client
  up: float  # bytes a second from the client
  latency: float  # seconds of a round trip
  source: str
  # Electricity of the network for a byte; None: the source has no figure.
  joules: float | None = None


# Read on 2026-11-28.
DEVICES = {
  'phone': Device(
    'Apple A17 Pro, 6-core GPU', 2.15e12, 'float32', 8 * 2**30, None,
    'https://hmc-tech.com/gpu/apple-6-core-a17-pro-vs-imagination-img-axe-2-16'
    ' (operations); https://grokipedia.com/page/Apple_A17 (memory)',
  ),
  # 1,024 cores of two operations a cycle at 625 MHz; its second power mode.
  'orin_nano': Device(
    'NVIDIA Jetson Orin Nano 8GB', 2 * 1024 * 625e6, 'float32', 8 * 2**30, 15.0,
    'https://www.brojogopalsapui.com/ai-foundations/sub_contents/AI_hardware/'
    'jetson_orin_nano_light.html',
  ),
  'rtx_4090': Device(
    'NVIDIA GeForce RTX 4090', 82.6e12, 'float16', 24 * 2**30, 450.0,
    'https://calwoo.github.io/notes/concepts/deep-learning-engineering/'
    'nvidia-gpu-hardware/index.html (operations); '
    'https://ozyphus.github.io/gpu-maths.html (watts)',
  ),
  'a100': Device(
    'NVIDIA A100 SXM 40GB', 311.87e12, 'bfloat16', 40 * 2**30, 400.0,
    'https://hmc-tech.com/gpu/nvidia-h100-vs-nvidia-a100-sxm-40gb',
  ),
  'h100': Device(
    'NVIDIA H100 PCIe', 756.45e12, 'bfloat16', 80 * 2**30, 350.0,
    'https://hmc-tech.com/gpu/nvidia-h100-vs-nvidia-a100-sxm-40gb',
  ),
}  # fmt: skip

_SPEEDTEST = (
  'https://my-financial-wealth.com/2020/10/25/'
  'the-global-mobile-and-broadband-internet-speed-ranking/ '
  '(Speedtest Global Index, September 2020, means)'
)
# Joules: core and access network, 0.14 kWh a gigabyte for mobile and 0.03 for
# fixed networks, of the EU's ICT impact study of 2020, as quoted by
# https://methodology.scope3.com/data_transfer. Aslan et al. 2018 (J. Industrial
# Ecology 22(4), doi 10.1111/jiec.12630) have 0.06 for fixed networks in 2015,
# halved every two years; the end devices are not in either figure.
LINKS = {
  'mobile': Link(
    'mobile networks of the world',
    35.96 * _MBIT,
    11.22 * _MBIT,
    0.040,
    _SPEEDTEST,
    0.14 * _KWH_A_GB,
  ),
  'broadband': Link(
    'fixed broadband of the world',
    85.73 * _MBIT,
    45.74 * _MBIT,
    0.021,
    _SPEEDTEST,
    0.03 * _KWH_A_GB,
  ),
  # The source has no latency for 5G: that of `mobile`.
  '5g': Link(
    '5G networks of the world', 166.13 * _MBIT, 21.08 * _MBIT, 0.040,
    'https://ooklacommain.kinsta.cloud/articles/author/isla-mcketta/page/3 '
    '(Speedtest Intelligence, third quarter of 2021, medians)',
  ),
  # A nominal rate, not a measurement.
  'ethernet': Link(
    '1 Gbit/s Ethernet', 1000 * _MBIT, 1000 * _MBIT, 0.001,
    'IEEE 802.3ab: 1000BASE-T; a latency of 1 ms is assumed',
  ),
}  # fmt: skip
