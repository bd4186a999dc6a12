"""Turn a model's shapes into what a stage costs on a number of devices: bytes sent a step, seconds, hours.

Nothing here is measured. Volumes: Rajbhandari et al. 2020, ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models (arXiv 1910.02054), section 7, in rings, where a device sends (N - 1) / N of what is reduced or
gathered. Not as there: frozen weights count, and so does every micro-batch of an accumulated step. Time: work at a
utilisation that the reader names, and sending at a bandwidth that the reader names; one behind the other, or one
hidden behind the other.

N devices, a micro-batches a step.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from llava_lite.train.memory import GIB, USABLE_SHARE, activation_bytes, fewest_checkpointed, loss_bytes, weight_bytes
from llava_lite.train.throughput import step_flops
from llava_lite.train.tuning import count

# Of float32 master weights with half-precision products: what travels is in half precision.
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
    """A stage's data: records, and tokens, supervised tokens and pictures of one; records a step in the recipe."""

    num_records: int
    tokens: float
    supervised: float
    pictures: float
    global_batch: int


class Weights(NamedTuple):
    """Numbers of weights: all, those that the backward pass goes through, those that train."""

    all: int
    behind: int
    trained: int


def weights_of(model):
    """Return the Weights of a LLaVA model with its present choice of what trains.

    The backward pass goes through what stands behind the first trained weight: connector and decoder, and the tower
    if it trains.
    """
    params = list(model.named_parameters())
    tower_trains = any(param.requires_grad for name, param in params if "vision_tower" in name)
    return Weights(
        all=sum(count(param) for _, param in params),
        behind=sum(count(param) for name, param in params if tower_trains or "vision_tower" not in name),
        trained=sum(count(param) for _, param in params if param.requires_grad),
    )


def sent_bytes(weights, zero_stage, num_devices, num_micro=1, wire_bytes=WIRE_BYTES):
    """Return the bytes that a device sends in a step, by collective: {"reduce": .., "gather": ..}.

    ZeRO-0 and 1: gradients are summed once a step, which on every rank is a gather more. ZeRO-2: likewise at each
    micro-batch, and the weights that trained are gathered from their owners. The paper's ZeRO-2 sums gradients to
    their owners alone, a third less; DeepSpeed 0.19.8 sums them on every rank (counted in test_scale.py). ZeRO-3:
    gradients to their owners; every weight is gathered for the forward pass of each micro-batch, and again for its
    backward pass, but for those that are still there (stage3_max_live_parameters, not counted here).
    """
    share = (num_devices - 1) / num_devices * wire_bytes
    if zero_stage >= 3:
        gathered = num_micro * (weights.all + weights.behind)
        return {"reduce": num_micro * weights.trained * share, "gather": gathered * share}
    num_sums = num_micro if zero_stage == 2 else 1
    num_gathers = num_sums + (zero_stage == 2)
    return {"reduce": num_sums * weights.trained * share, "gather": num_gathers * weights.trained * share}


class Step(NamedTuple):
    """A step of a device: records of a micro-batch, micro-batches, records of all, what it sends, seconds of both."""

    micro_batch: int
    num_micro: int
    global_batch: int
    sent_bytes: float
    work_s: float
    send_s: float


def step_of(model, work, zero_stage, cluster, largest_micro):
    """Return the Step of a stage whose micro-batches are of at most `largest_micro` records.

    A step has the recipe's records, or one a device where there are more devices than records.
    """
    global_batch = max(work.global_batch, cluster.num_devices)
    a_device = math.ceil(global_batch / cluster.num_devices)
    num_micro = math.ceil(a_device / largest_micro)
    micro_batch = math.ceil(a_device / num_micro)
    records = micro_batch * num_micro
    flops = step_flops(model).of_batch(work.tokens * records, work.supervised * records, work.pictures * records)
    sent = sum(sent_bytes(weights_of(model), zero_stage, cluster.num_devices, num_micro).values())
    return Step(
        micro_batch,
        num_micro,
        records * cluster.num_devices,
        sent,
        flops / (cluster.peak_flops * cluster.mfu),
        sent / cluster.bandwidth,
    )


def hours_of(step, work):
    """Return the hours of a pass over the records: sending hidden behind work, and one behind the other."""
    num_steps = math.ceil(work.num_records / step.global_batch)
    return num_steps * max(step.work_s, step.send_s) / 3600, num_steps * (step.work_s + step.send_s) / 3600


class Fit(NamedTuple):
    """Bytes of a device, with the fewest checkpointed layers of so many with which they fit, if they do."""

    states: float  # weights, gradients, optimizer
    activations: float
    num_checkpointed: int
    fits: bool

    @property
    def total(self):
        """Return the sum."""
        return self.states + self.activations


def fit_of(model, work, zero_stage, cluster, micro_batch, dtype_bytes=WIRE_BYTES):
    """Return the Fit of a micro-batch of average records."""
    num_tokens = micro_batch * work.tokens
    states = sum(weight_bytes(model, zero_stage, cluster.num_devices))
    loss = loss_bytes(model, micro_batch * work.supervised, dtype_bytes)

    def kept(number):
        return activation_bytes(model, num_tokens, dtype_bytes, number) + loss

    budget = USABLE_SHARE["cuda"] * cluster.memory_bytes
    chosen = fewest_checkpointed(len(model.get_model().layers), lambda number: states + kept(number), budget)
    return Fit(states, kept(chosen), chosen, states + kept(chosen) <= budget)


def on(cluster, num_devices):
    """Return the cluster with another number of devices."""
    return replace(cluster, num_devices=num_devices)
