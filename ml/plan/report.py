"""What a preflight found, as data, as JSON and as tables. All of it is predicted; none of it was measured."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from ml.plan.collectives import Collective, by_axes
from ml.plan.mends import Mend
from ml.plan.roofline import Roofline

NOTE = "predicted by compiling for devices that are not here; nothing was run or timed"
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device.

    Attributes:
      params, opt_state, ema: arrays that live throughout.
      batch: the step's input.
      temporary: gradients, activations and workspace as the compiler planned them; ``None``: it refused before.
      program: the compiled code.
      host: kept in the host's memory.
      compute_copies, gradients, gathered, activations: by formula, what ``temporary`` is made of.
      needed: in all, as the compiler planned or as it said when it refused.
      available: to a program.
    """

    params: int
    opt_state: int
    ema: int
    batch: int
    temporary: int | None
    program: int
    host: int
    compute_copies: int
    gradients: int
    gathered: int
    activations: int
    needed: float
    available: float

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.needed <= self.available


@dataclasses.dataclass(frozen=True)
class Report:
    """A preflight.

    Attributes:
      topology: as named by the user.
      device_kind: of its devices.
      devices: how many.
      mesh: degrees.
      layout: see `ml.parallel.LAYOUTS`.
      tokens: of a step.
      memory: of the fullest device.
      collectives: of the compiled step; empty if it was refused.
      flops: of a step on one device: of the model, and with what is computed again.
      roofline: what binds; ``None`` if it was refused.
      mends: by which it might fit.
      compile_seconds: on this machine.
      versions: of the compilers.
    """

    topology: str
    device_kind: str
    devices: int
    mesh: dict[str, int]
    layout: str
    tokens: int
    memory: DeviceMemory
    collectives: list[Collective]
    flops: dict[str, float]
    roofline: Roofline | None
    mends: list[Mend]
    compile_seconds: float
    versions: dict[str, str]

    @property
    def fits(self) -> bool:
        """Whether the step fits the devices' memory."""
        return self.memory.fits

    def verdict(self) -> str:
        """One line: fits, or what it needs and the mends."""
        memory = self.memory
        sizes = f"{memory.needed / _GIB:.1f} of {memory.available / _GIB:.1f} GiB"
        if self.fits:
            return f"fits: {sizes} on each of {self.devices} x {self.device_kind}"
        if not self.mends:
            return f"does not fit: needs {sizes}; no change that we try would do, so use more devices"
        ways = " or ".join(f"{mend} (about {mend.bytes / _GIB:.1f})" for mend in self.mends)
        return f"does not fit: needs {sizes}: try {ways}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json`."""
        plain = dataclasses.asdict(self)
        plain["note"] = NOTE
        plain["fits"] = self.fits
        plain["collectives"] = [
            {"kind": kind, "axes": list(axes), "bytes": round(size), "times": times}
            for (kind, axes), (size, times) in by_axes(self.collectives).items()
        ]
        plain["mends"] = [{"flags": str(mend), "bytes": round(mend.bytes)} for mend in self.mends]
        if self.roofline:
            line = self.roofline
            plain["roofline"] |= {
                "network": dict(line.network),
                "binding": line.binding,
                "seconds": line.seconds,
                "serial_seconds": line.serial_seconds,
                "mfu": line.mfu,
                "serial_mfu": line.serial_mfu,
            }
        return plain

    def print(self, console: Console) -> None:
        """Tables, and the verdict."""
        mesh = " x ".join(f"{name}={size}" for name, size in self.mesh.items() if size > 1) or "one device"
        console.print(f"{self.devices} x {self.device_kind} ({self.topology}), mesh {mesh}, layout {self.layout}")
        console.print(f"{NOTE[0].upper()}{NOTE[1:]}.")
        console.print(self._memory_table())
        if self.roofline:
            console.print(self._collectives_table())
            console.print(self._roofline_table(self.roofline))
        console.print(self.verdict(), soft_wrap=True)

    def _memory_table(self) -> Table:
        memory = self.memory
        table = Table(title="memory of a device", title_justify="left")
        table.add_column("what")
        table.add_column("GiB", justify="right")
        table.add_column("from")
        rows: list[tuple[str, float | None, str]] = [
            ("parameters", memory.params, "layout"),
            ("optimizer state", memory.opt_state, "layout"),
            ("moving average", memory.ema, "layout"),
            ("batch", memory.batch, "layout"),
            ("temporaries", memory.temporary, "compiler"),
            ("  compute copies", memory.compute_copies, "formula"),
            ("  gradients", memory.gradients, "formula"),
            ("  weights gathered for a layer", memory.gathered, "formula"),
            ("  activations", memory.activations, "formula"),
            ("program", memory.program, "compiler"),
            ("needed", memory.needed, "compiler"),
            ("available", memory.available, "device"),
            ("in the host's memory", memory.host, "layout"),
        ]
        for name, size, source in rows:
            if size is None:
                table.add_row(name, "-", "refused")
            elif size or name == "needed":
                table.add_row(name, f"{size / _GIB:.3f}", source)
        return table

    def _collectives_table(self) -> Table:
        table = Table(title="what a device sends in a step", title_justify="left")
        table.add_column("collective")
        table.add_column("mesh axes")
        table.add_column("GB", justify="right")
        table.add_column("times", justify="right")
        for (kind, axes), (size, times) in by_axes(self.collectives).items():
            table.add_row(kind, ", ".join(axes), f"{size / 1e9:.3f}", str(times))
        return table

    def _roofline_table(self, line: Roofline) -> Table:
        table = Table(title="least time of a step, at data-sheet rates", title_justify="left")
        table.add_column("term")
        table.add_column("ms", justify="right")
        model, computed = self.flops["model"], self.flops["computed"]
        table.add_row(
            f"compute ({computed / 1e12:.1f} TFLOP, of them the model's {model / 1e12:.1f})", _ms(line.compute)
        )
        table.add_row("device memory (formula)", _ms(line.memory))
        for axes, seconds in sorted(line.network.items(), key=lambda item: -item[1]):
            table.add_row(f"network along {axes}", _ms(seconds))
        table.add_row(f"all overlapped: MFU at most {line.mfu:.0%}, bound by {line.binding}", _ms(line.seconds))
        table.add_row(f"no transfer overlapped: MFU {line.serial_mfu:.0%}", _ms(line.serial_seconds))
        return table


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"
