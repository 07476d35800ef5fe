"""A training process that passes one batch whole, then sharded, gathered, and sharded again.

Of each case it answers with the largest difference of loss and gradients to the whole model.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from moshi.utils.compile import no_compile

from duplex.config_train import TrainSection
from pipeline.engines.checkpoint import Checkpoint
from tests.stages.training_factories import make_clip
from training.batches import make_batch
from training.distributed import Ranks, gathered, shard
from training.forward import make_forward
from training.launch import work
from training.lora import adapter_parameters, add_adapters, target_modules
from training.loss import coefficients, part_counts


def do(job: dict[str, Any], report: Any) -> list[float]:
    accelerator = Accelerator(cpu=True)
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)
    assert ranks.count == 2
    return [_difference(Path(job["checkpoint"]), case, ranks) for case in job["cases"]]


def _difference(checkpoint: Path, case: dict[str, Any], ranks: Ranks) -> float:
    section = TrainSection.model_validate(case)
    lm = Checkpoint.open(checkpoint).load_lm(dtype=getattr(torch, section.dtype))
    users = section.loss.user_streams
    targets = target_modules(
        lm,
        section.lora.targets,
        embeddings=section.lora.embeddings,
        codebooks=16 if users else 8,
    )
    add_adapters(lm, section.lora, targets, 3)
    parameters = adapter_parameters(lm)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(std=0.05, generator=generator)
    forward = make_forward(lm.train(), section)
    batch = make_batch([make_clip("a", 20, 1), make_clip("b", 16, 2)], users)
    weights = coefficients(part_counts(batch.codes, batch.loss_mask), section.loss)

    def once() -> torch.Tensor:
        lm.zero_grad(set_to_none=True)
        torch.manual_seed(5)  # of dropout
        with no_compile():
            loss, _ = forward(batch.codes, batch.loss_mask, weights)
            loss.backward()
        grads = [p.grad for p in parameters.values() if p.grad is not None]
        assert len(grads) == len(parameters)
        return torch.cat([loss.detach().reshape(1), *(grad.flatten().float() for grad in grads)])

    expected = once()
    assert expected[1:].any()
    modules: Any = forward.shardable_modules
    sharded = shard(modules(), ranks, parameters.values())
    found = [once()]
    with gathered(sharded):
        found.append(once())
    found.append(once())
    return max(float((each - expected).abs().max()) for each in found)


if __name__ == "__main__":
    work(do)
