"""The `train` section of the configuration; formulas of its loss in `training/loss.py`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from duplex.sections import Probability, Runtime, Section, StageSection

Device = Literal["auto", "cpu", "cuda"]
TargetGroup = Literal["attention", "mlp", "depth", "heads", "text"]
TARGET_GROUPS: tuple[TargetGroup, ...] = ("attention", "mlp", "depth", "heads", "text")


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT or [IPv6]:PORT -> host, port.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9_.-]+)):(\d{1,5})", address)
    if found is None or not 0 < int(found[3]) < 65536:
        raise ValueError(f"main_address must read HOST:PORT, as in 10.0.0.5:29400, found {address}")
    return found[1] or found[2], int(found[3])


class LoraSection(Section):
    rank: int = Field(default=16, ge=1, le=1024)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank), not alpha / rank")
    targets: tuple[TargetGroup, ...] = Field(
        default=TARGET_GROUPS, min_length=1, description="groups of layers that get adapters"
    )
    embeddings: bool = Field(default=False, description="adapters on the input embeddings too")


class LossSection(Section):
    """Weights of the cross-entropy terms; formulas in `training/loss.py`."""

    semantic_weight: float = Field(default=100.0, ge=0)
    acoustic_weight: float = Field(default=1.0, ge=0)
    text_padding_weight: float = Field(default=0.5, ge=0)
    normalize: Literal["terms", "all", "none"] = Field(
        default="terms",
        description="terms: text mean + audio mean; all: one mean over everything; "
        "none: weighted sum of means, as the predecessor had",
    )
    prompt: bool = Field(default=False, description="true: prompt frames carry loss")
    user_streams: bool = Field(
        default=False, description="the user's codes carry loss too; needs a base with dep_q 16"
    )


class GuardsSection(Section):
    """What is watched while training, on held-out clips (`training/guards.py`)."""

    swaps: int = Field(
        default=3, ge=0, le=32, description="other prompts that each clip is scored under; 0: none"
    )
    clips: int = Field(default=4, ge=0, le=64, description="clips that are scored or run freely")
    every: int | None = Field(
        default=None, ge=1, description="steps between checks; None: at each validation"
    )
    free_seconds: float = Field(
        default=12, ge=0, le=240, description="length of each free-running check; 0: none"
    )
    budget: bool = Field(default=True, description="shares of loss and gradient at each check")
    on_collapse: Literal["warn", "stop"] = Field(
        default="warn", description="what a model that falls silent or repeats itself brings"
    )


class BaseDataSection(Section):
    """Other tensors mixed in, so that the base's abilities are not forgotten."""

    folders: tuple[str, ...] = Field(
        default=(), description="tensors stage folders: runs/<config>/05-tensors-<key>"
    )
    share: Probability = Field(default=0.1, description="share of each batch, on average")


class TrainRuntime(Runtime):
    device: Device = "auto"
    checkpoint_every: int = Field(default=20, ge=1, description="steps between checkpoints")
    wandb: bool = Field(default=False, description="log to Weights & Biases too")
    checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="activations made again in the backward pass: of every second layer, or all",
    )
    nodes: int = Field(
        default=1, ge=1, le=64, description="machines that the processes are spread over evenly"
    )
    node_rank: int = Field(
        default=0, ge=0, le=63, description="which of them this one is; 0 writes the run folder"
    )
    main_address: str | None = Field(
        default=None, description="HOST:PORT of node 0, as the others reach it"
    )
    join_timeout_s: float = Field(
        default=600, gt=0, description="longest wait for the other nodes, and to connect them all"
    )

    @model_validator(mode="after")
    def _places(self) -> TrainRuntime:
        if self.node_rank >= self.nodes:
            raise ValueError(
                f"node_rank must be below nodes, found {self.node_rank} and {self.nodes}"
            )
        if self.nodes > 1 and self.main_address is None:
            raise ValueError("nodes above 1 needs main_address, HOST:PORT of node 0, found none")
        if self.main_address is not None:
            split_address(self.main_address)
        return self


class TrainSection(StageSection):
    steps: int = Field(default=1000, ge=1)
    epochs: float | None = Field(
        default=None, gt=0, description="passes over the clips; takes the place of steps"
    )
    batch_size: int = Field(default=8, ge=1, description="clips a step, over all processes")
    accumulate: int = Field(default=1, ge=1, description="parts that a batch is worked through in")
    bucket_batches: int = Field(
        default=4, ge=1, description="batches whose clips are sorted by length; 1: none"
    )
    crop_frames: int = Field(default=1250, ge=16, le=3000, description="longest training clip")
    learning_rate: float = Field(default=2e-4, gt=0)
    depth_learning_rate: float | None = Field(
        default=None, gt=0, description="of the depth transformer; None: learning_rate"
    )
    warmup_steps: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    validate_every: int = Field(default=20, ge=1, description="steps between validations")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the base's weights"
    )
    quantize: Literal["none", "nf4"] = Field(
        default="none", description="nf4: the frozen base in 4 bits (bitsandbytes)"
    )
    forward: Literal["fast", "library"] = Field(
        default="fast", description="library: moshi's own forward, for comparison"
    )
    compile: bool = Field(default=False, description="torch.compile of the layers")
    processes: int = Field(default=1, ge=1, le=64, description="FSDP2 over so many")
    continue_from: str | None = Field(
        default=None, description="an adapter folder to go on from, trained on the same base"
    )
    lora: LoraSection = LoraSection()
    loss: LossSection = LossSection()
    guards: GuardsSection = GuardsSection()
    base_data: BaseDataSection = BaseDataSection()
    runtime: TrainRuntime = TrainRuntime()

    def is_due(self, every: int, step: int) -> bool:
        """After `step` updates: at the start, at the end, and every `every` steps."""
        return step in (0, self.steps) or step % every == 0

    def guards_due(self, step: int) -> bool:
        """Whether there is a check of the guards after `step` updates."""
        return self.is_due(self.guards.every or self.validate_every, step)

    @model_validator(mode="after")
    def _consistent(self) -> TrainSection:
        if self.batch_size % (self.accumulate * self.processes):
            raise ValueError(
                "batch_size must be a multiple of accumulate * processes, found "
                f"{self.batch_size} and {self.accumulate} * {self.processes}"
            )
        if self.processes % self.runtime.nodes:
            raise ValueError(
                "processes must be a multiple of runtime.nodes, found "
                f"{self.processes} and {self.runtime.nodes}"
            )
        if self.quantize == "nf4" and self.processes > 1:
            raise ValueError(
                "quantize: nf4 must run in one process, found processes "
                f"{self.processes}: FSDP cannot shard packed weights"
            )
        if self.compile and self.processes > 1:
            raise ValueError(f"compile must be of one process, found processes {self.processes}")
        every, validate = self.guards.every or self.validate_every, self.validate_every
        if every % validate and validate % every:
            raise ValueError(
                "guards.every and validate_every: one must be a multiple of the other, found "
                f"{every} and {validate}: the best adapter is chosen where both are due"
            )
        again = self.runtime.checkpointing
        if self.forward == "library" and (self.compile or again == "selective"):
            raise ValueError("compile and checkpointing: selective need forward: fast")
        if self.forward == "library" and again == "full" and self.lora.dropout:
            raise ValueError(
                "checkpointing: full with forward: library must have lora.dropout 0, found "
                f"{self.lora.dropout}: moshi's own draws other units when it computes again"
            )
        return self
