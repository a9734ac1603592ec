"""Papers whose method is in the house but whose claim no study has tested yet, as data for ``docs/papers.md``."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """A published method that this project has.

    Attributes:
      paper: title (or what it is known by) and year.
      have: what of it is here, in a few words.
      where: the file or folder, from the root of the project.
    """

    paper: str
    have: str
    where: str


METHODS = (
    # Optimization.
    Method(
        "LARS (You, Gitman, Ginsburg 2017)", "in its form of 2017 and in that of the LAMB paper", "ml/optim/lars.py"
    ),
    Method("Adafactor (Shazeer, Stern 2018)", "factored second moments, per layer", "ml/optim/memory_saving.py"),
    Method("SM3 (Anil et al. 2019)", "covers by rows and columns, per layer", "ml/optim/memory_saving.py"),
    Method("Muon (Jordan et al. 2024; Liu et al. 2025)", "per matrix, with a shared rate", "ml/optim/muon.py"),
    Method("Schedule-free learning (Defazio et al. 2024)", "over AdamW and SGD", "ml/optim/schedule_free.py"),
    Method("D-Adaptation (2023), Prodigy (2024)", "over AdamW", "ml/optim/learning_rate_free.py"),
    Method("DoG and DoWG (2023)", "over SGD", "ml/optim/learning_rate_free.py"),
    Method("Mechanic (Cutkosky et al. 2023)", "over AdamW", "ml/optim/learning_rate_free.py"),
    Method("COCOB (Orabona, Tommasi 2017)", "element by element", "ml/optim/learning_rate_free.py"),
    # Training on many devices.
    Method("ZeRO (Rajbhandari et al. 2020)", "stages 1 to 3, and whole replicas of cut groups", "ml/parallel/rules.py"),
    Method("ZeRO-Offload, ZeRO-Infinity (2021)", "optimizer state in the hosts' memory", "ml/train/offload.py"),
    Method("Megatron-LM (2019, 2021, 2022)", "tensor and sequence parallelism", "ml/parallel/rules.py"),
    Method("GPipe, PipeDream-Flush, interleaved 1F1B", "as one table", "ml/parallel/pipeline_schedule.py"),
    Method("Ring Attention (Liu et al. 2023)", "in zig-zag order", "ml/parallel/context/ring.py"),
    Method("DeepSpeed-Ulysses (Jacobs et al. 2023)", "heads exchanged for tokens", "ml/parallel/context/ulysses.py"),
    Method("Switch Transformer (Fedus et al. 2021)", "balancing loss; no token is dropped", "ml/models/moe"),
    Method("Demons in the Detail (Qiu et al. 2025)", "balance over the global batch", "ml/models/moe/balance.py"),
    Method("DeepSeek-V3 (2024)", "balance by a bias instead of a loss", "ml/models/moe/balance.py"),
    Method(
        "MegaScale (Jiang et al. 2024)", "parallel block; who fell behind is named", "ml/parallel/processes/health.py"
    ),
    Method("Pipette (Yim et al. 2024)", "latency model of arrangements", "ml/plan/latency.py"),
    # Attention.
    Method("FlashAttention 1 to 3 (2022 to 2024)", "kernels for TPU and Hopper", "pallas_kernels/flash_attention"),
    Method("YaRN (Peng et al. 2023)", "rotary embedding for longer contexts", "ml/models/rope.py"),
    Method("Hydragen (Juravsky et al. 2024)", "for a tree of prefixes", "pallas_kernels/shared_prefix_attention"),
    # Serving.
    Method("PagedAttention, vLLM (Kwon et al. 2023)", "kernels and cache", "pallas_kernels/paged_attention"),
    Method("RadixAttention, SGLang (Zheng et al. 2023)", "automatic reuse", "ml/serve/scheduling/prefix_tree.py"),
    Method("Sarathi-Serve (Agrawal et al. 2024)", "stall-free schedule", "ml/serve/scheduling/scheduler.py"),
    Method("BatchLLM (Zheng et al. 2024)", "offline planner", "ml/serve/scheduling/planner.py"),
    Method(
        "LLM.int8() (Dettmers et al. 2022)", "8-bit weights by absmax, no outliers apart", "ml/weights/quantized.py"
    ),
)
