"""Turn a model's shapes into what a stage costs on a number of devices: bytes sent a step, seconds, hours.

Nothing here is measured. Volumes: Rajbhandari et al. 2020, ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models (arXiv 1910.02054), section 7, in rings, where a device sends (N - 1) / N of what is reduced or
gathered. Different here: frozen weights count, and so does every micro-batch of an accumulated step. Time: compute at
a given utilisation and communication at a given bandwidth, overlapped or one after the other.

N devices, a micro-batches a step.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from llava_lite.train.estimate.checkpointing import USABLE_FRACTION, fewest_checkpointed
from llava_lite.train.estimate.memory import GIB, activation_bytes, loss_bytes, weight_bytes
from llava_lite.train.monitor.throughput import step_flops
from llava_lite.train.tuning import count

# With float32 master weights and a half-precision forward pass, communication is in half precision.
WIRE_BYTES = 2


@dataclass(frozen=True)
class Cluster:
    """Devices and their links. bandwidths: bytes/s that a device sends, to its node's others and out of the node."""

    num_devices: int = 8
    devices_a_node: int = 8
    memory_bytes: float = 80 * GIB
    peak_flops: float = 989e12
    mfu: float = 0.4
    node_bandwidth: float = 300e9
    network_bandwidth: float = 40e9

    @property
    def bandwidth(self):
        """Bytes/s of the slowest link of a ring through all devices."""
        return self.node_bandwidth if self.num_devices <= self.devices_a_node else self.network_bandwidth


class Work(NamedTuple):
    """A stage's data: records, and tokens, supervised tokens and images of one; records a step in the recipe."""

    num_records: int
    tokens: float
    supervised: float
    images: float
    global_batch: int


class Weights(NamedTuple):
    """Numbers of weights: all, those that the backward pass goes through, trained ones."""

    all: int
    in_backward: int
    trained: int


def get_weights(model):
    """Return the Weights of a LLaVA model, with its trained weights as they are now.

    The backward pass goes back to the first trained weight: through decoder and connector, and the tower if it trains.
    """
    params = list(model.named_parameters())
    tower_trains = any(param.requires_grad for name, param in params if "vision_tower" in name)
    return Weights(
        all=sum(count(param) for _, param in params),
        in_backward=sum(count(param) for name, param in params if tower_trains or "vision_tower" not in name),
        trained=sum(count(param) for _, param in params if param.requires_grad),
    )


def sent_bytes(weights, zero_stage, num_devices, num_micro=1, wire_bytes=WIRE_BYTES):
    """Return the bytes that a device sends in a step, by collective: {"reduce": .., "gather": ..}.

    ZeRO-0/1: one all-reduce a step. ZeRO-2: one all-reduce a micro-batch and one all-gather of updated weights; the
    paper has a reduce-scatter a micro-batch, a third less, but DeepSpeed 0.19.8 reduces on every rank (counted in
    test_scale.py). ZeRO-3: one reduce-scatter a micro-batch, and an all-gather of every weight for the forward pass of
    each micro-batch and again for its backward pass, except weights that are still gathered
    (stage3_max_live_parameters, not counted here).
    """
    bytes_a_weight = (num_devices - 1) / num_devices * wire_bytes
    if zero_stage >= 3:
        gathered = num_micro * (weights.all + weights.in_backward)
        return {"reduce": num_micro * weights.trained * bytes_a_weight, "gather": gathered * bytes_a_weight}
    num_sums = num_micro if zero_stage == 2 else 1
    num_gathers = num_sums + (zero_stage == 2)
    trained_bytes = weights.trained * bytes_a_weight
    return {"reduce": num_sums * trained_bytes, "gather": num_gathers * trained_bytes}


class Step(NamedTuple):
    """A step of a device: its records a micro-batch, micro-batches, records of all devices, bytes sent, seconds."""

    micro_batch: int
    num_micro: int
    global_batch: int
    sent_bytes: float
    work_s: float
    send_s: float


def get_step(model, work, zero_stage, cluster, largest_micro):
    """Return the Step of a stage whose micro-batches are of at most `largest_micro` records.

    A step has the recipe's records, or one a device where there are more devices than records.
    """
    global_batch = max(work.global_batch, cluster.num_devices)
    a_device = math.ceil(global_batch / cluster.num_devices)
    num_micro = math.ceil(a_device / largest_micro)
    return count_step(model, work, zero_stage, cluster, math.ceil(a_device / num_micro), num_micro)


def count_step(model, work, zero_stage, cluster, micro_batch, num_micro, wire_bytes=WIRE_BYTES):
    """Return the Step of a device that reads `num_micro` micro-batches of `micro_batch` records."""
    records = micro_batch * num_micro
    flops = step_flops(model).of_batch(work.tokens * records, work.supervised * records, work.images * records)
    sent = sum(sent_bytes(get_weights(model), zero_stage, cluster.num_devices, num_micro, wire_bytes).values())
    return Step(
        micro_batch,
        num_micro,
        records * cluster.num_devices,
        sent,
        flops / (cluster.peak_flops * cluster.mfu),
        sent / cluster.bandwidth,
    )


def get_hours(step, work):
    """Return the hours of a pass over the records: with communication overlapped by compute, and without."""
    num_steps = math.ceil(work.num_records / step.global_batch)
    return num_steps * max(step.work_s, step.send_s) / 3600, num_steps * (step.work_s + step.send_s) / 3600


class Fit(NamedTuple):
    """Bytes of a device with the fewest checkpointed layers with which they fit; with all if they never do."""

    states: float  # weights, gradients, optimizer
    activations: float
    num_checkpointed: int
    fits: bool

    @property
    def total(self):
        """Return the sum."""
        return self.states + self.activations


def get_fit(model, work, zero_stage, cluster, micro_batch, dtype_bytes=WIRE_BYTES):
    """Return the Fit of a micro-batch of average records."""
    num_tokens = micro_batch * work.tokens
    states = sum(weight_bytes(model, zero_stage, cluster.num_devices))
    loss = loss_bytes(model, micro_batch * work.supervised, dtype_bytes)

    def kept(number):
        return activation_bytes(model, num_tokens, dtype_bytes, number) + loss

    budget = USABLE_FRACTION["cuda"] * cluster.memory_bytes
    chosen = fewest_checkpointed(len(model.get_model().layers), lambda number: states + kept(number), budget)
    return Fit(states, kept(chosen), chosen, states + kept(chosen) <= budget)


def on(cluster, num_devices):
    """Return the cluster with another number of devices."""
    return replace(cluster, num_devices=num_devices)
