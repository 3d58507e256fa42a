"""The stages of an evaluation, in running order. Each module has three functions:

`plan(context)` yields the phases ahead with estimated seconds; `run(context, results)` computes them batch by
batch through `context.batches` and adds measurements, warnings, figures and examples to `results`;
`compute(context)` computes the batches of a shard and nothing else.
"""

from types import ModuleType

from ratioctl.evaluation.stages import certified, clean, explanations, ood, radius, robust, scores, worst_case

STAGES: dict[str, ModuleType] = {
    "clean": clean,
    "ood": ood,
    "robust": robust,
    "worst_case": worst_case,
    "scores": scores,
    "radius": radius,
    "certified": certified,
    "explanations": explanations,
}
