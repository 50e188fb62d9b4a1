"""What is known of the CUDA kernels without a GPU, out of the files of benchmarks/results.

Registers: blocks per multiprocessor. Instructions: per warp and chunk, upper bounds. Traffic: bytes and
sectors per kernel, traced at one length in 1 and in 4 segments.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gpu_model import Kernel
from .report import RESULTS

REGISTERS, INSTRUCTIONS = "kernel_registers_sm80_sm90.json", "kernel_instructions_sm80_sm90.json"
TRAFFIC = "traffic.json"
ARCHITECTURE = 90  # H100 and H200


class MissingFactsError(RuntimeError):
    """A file of benchmarks/results lacks what this needs; the message says how to make it again."""


@dataclass(frozen=True)
class Facts:
    """The three files, as they are."""

    registers: list[dict[str, Any]]
    instructions: list[dict[str, Any]]
    traffic: dict[str, dict[str, Any]]  # by "<sweep> <map> <segments>"
    traced_tokens: int
    commands: dict[str, str]  # by file

    def kernel(self, base_name: str, feature_map: str) -> Kernel:
        """The instance for bfloat16, d 16, one query head per kv head."""
        compiled = [x for x in self.registers if _is_instance(x["name"], base_name, feature_map)]
        counted = [x for x in self.instructions if _is_instance(x["name"], base_name, feature_map)]
        if not compiled:
            raise MissingFactsError(f"{base_name} for {feature_map} is not in {REGISTERS}")
        facts = compiled[0]
        per_chunk = counted[0] if counted else {"chunk_instructions": 0, "chunk_opcodes": {}}
        return Kernel(
            facts["name"],
            facts["blocks"],
            facts["threads"] // 32,
            per_chunk["chunk_instructions"],
            per_chunk["chunk_opcodes"].get("HMMA", 0),
        )

    def kernels(self, sweep: str, feature_map: str, segments: int) -> dict[str, dict[str, float]]:
        """By name in launch order, bytes and sector bytes per head and token."""
        run = self.traffic[f"{sweep} {feature_map} {segments}"]
        if not run.get("kernels"):
            raise MissingFactsError(f"{TRAFFIC} has no bytes per kernel: {self.commands[TRAFFIC]}")
        return {kernel["kernel"]: kernel for kernel in run["kernels"]}

    def state_share(self, sweep: str, feature_map: str) -> dict[str, float]:
        """Of a kernel that only a sweep in segments has: what it moves per head and token for states.

        All that these kernels move, less what the other buffers are asked for more than without segments.
        """
        whole, split = (self.traffic[f"{sweep} {feature_map} {segments}"] for segments in (1, 4))
        names = self.kernels(sweep, feature_map, 1)
        extra = [
            kernel
            for name, kernel in self.kernels(sweep, feature_map, 4).items()
            if name not in names and self.kernel(name, feature_map).chunk_instructions
        ]
        fields = {"bytes": ("read", "written"), "sector_bytes": ("sectors_read", "sectors_written")}
        result = {}
        for amount, parts in fields.items():
            tokens = [
                sum(buffer[x] for buffer in run["buffers"] for x in parts if "states" not in buffer["name"])
                for run in (split, whole)
            ]
            result[amount] = (sum(kernel[amount] for kernel in extra) - tokens[0] + tokens[1]) / len(extra)
        return result


SCANS = ("scan_kernel", "sum_slots_kernel")
SWEEPS = (
    *("forward_kernel", "segment_state_kernel", "reverse_segment_kernel", "grad_q_kernel", "grad_kv_kernel"),
    *SCANS,
)
ELEMENTWISE_SWEEPS = ("forward_kernel", "segment_state_kernel")


def _is_instance(name: str, base_name: str, feature_map: str) -> bool:
    """Whether a kernel is what serves the shapes here: of `outer` and `taylor` the sweeps are those of
    polynomial/, in chunks of 128 tokens; of other maps forward and the states of segments are those of
    elementwise/, and the rest is like tensor_core::grad_q_kernel<bfloat16, square, 16, false>.
    """
    # other paths' have the same names
    match = re.fullmatch(r"(?:tensor_core::)?(polynomial::|elementwise::)?(\w+)(?:<(.*)>)?", name)
    if match is None or match[2] != base_name:
        return False
    polynomial = feature_map in ("outer", "taylor")
    folder = "polynomial::" if polynomial else "elementwise::"
    if match[1] != (folder if base_name in (SWEEPS if polynomial else ELEMENTWISE_SWEEPS) else None):
        return False
    arguments = {x.strip() for x in (match[3] or "").split(",")}
    if match[1] == "polynomial::" and base_name not in SCANS:
        if "128" not in arguments:
            return False
        arguments.remove("128")
    maps = {"outer", "square", "taylor", "elu", "identity"} & arguments
    types = {"bfloat16", "float16", "float32", "float64"} & arguments
    numbers = {x for x in arguments if x.isdigit()}  # feature dim; of the step kernel its query heads
    sums = base_name.startswith("sum_")  # of gradients, always float32
    return (
        maps <= {feature_map}
        and types <= ({"float32"} if sums else {"bfloat16"})
        and "true" not in arguments
        and numbers <= {"1" if base_name == "step_kernel" else "16"}
    )


def load(folder: Path = RESULTS) -> Facts:
    files = {name: json.loads((folder / name).read_text()) for name in (REGISTERS, INSTRUCTIONS, TRAFFIC)}

    def of_architecture(name: str) -> list[dict[str, Any]]:
        return [x for x in files[name]["kernels"] if x["architecture"] == ARCHITECTURE]

    return Facts(
        of_architecture(REGISTERS),
        of_architecture(INSTRUCTIONS),
        {run["name"]: run for run in files[TRAFFIC]["runs"]},
        files[TRAFFIC]["tokens"],
        {name: contents["command"] for name, contents in files.items()},
    )
