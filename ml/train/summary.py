"""The closing report of a run, from its result."""

import jax

from ml.train.loop import Result
from ml.train.reporting import Report, gzip_bits_per_byte, read_metrics, xz_bits_per_byte

# Compressing is for comparison only: beyond this size it would keep the user waiting.
_LARGEST_TEXT_TO_COMPRESS = 64 * 2**20


def summarize(result: Result, **more: str) -> Report:
    """Puts the figures together.

    Args:
      result: of `ml.train.loop.train`.
      more: further files to list, label -> path; ``sample`` is a text that the model wrote.
    """
    prepared, workdir = result.prepared, result.workdir
    codes, text_bytes = prepared.codes_text, prepared.heldout_bytes
    compare = codes and 0 < text_bytes <= _LARGEST_TEXT_TO_COMPRESS
    text = [prepared.heldout_text()] if compare else []  # type: ignore[attr-defined]
    speed = result.session_tokens / result.seconds if result.seconds else _last_speed(result)
    devices = jax.devices()
    return Report(
        bits_per_byte=result.heldout.bits_per_byte(text_bytes) if result.heldout and codes else None,
        heldout=result.heldout.scalars if result.heldout and not codes else {},
        gzip_bits_per_byte=gzip_bits_per_byte(text) if compare else None,
        xz_bits_per_byte=xz_bits_per_byte(text) if compare else None,
        heldout_bytes=text_bytes,
        unit=result.unit,
        broken=result.broken,
        steps=result.step,
        tokens=result.tokens,
        tokens_per_second=speed,
        seconds=result.seconds,
        parameters=result.parameters,
        device=f"{len(devices)} x {devices[0].device_kind}",
        flops_utilization=speed * result.flops_per_token / result.peak_flops if result.peak_flops else None,
        memory=str(result.memory) if result.memory else None,
        sample=more.pop("sample", None),
        files={
            "checkpoint": workdir.checkpoints / str(result.step),
            "metrics": workdir.metrics,
            "TensorBoard": workdir.tensorboard,
            "loss curve": workdir.loss_plot,
            "report": workdir.report,
            **more,
        },
    )


def _last_speed(result: Result) -> float:
    """Speed of the run's latest recorded steps, where this start had none to do."""
    name = f"{result.unit}_per_second"
    speeds = [row[name] for row in read_metrics(result.workdir.metrics) if name in row]
    return speeds[-1] if speeds else 0.0
