"""Plant faults in the kernels, one at a time, and see that the tests fail: python tests/tools/mutate.py [NUMBER ...]

Each fault is planted in a copy of the tree, where the kernels' tests run until the first failure. Without numbers all
are planted, which takes an hour on two cores. The results go to mutants.md. Exits with 1 if any fault survives.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("mutants.md")
RUN = (
    "ops/test_functional.py kernels/test_kernels.py optim/test_optim.py kernels/test_memory.py kernels/test_matrix.py "
    "kernels/test_determinism.py"
)
CODE = "tools/test_compiled.py"  # compiles for GPUs, which takes minutes
GRAPHS = "emulation/test_recording.py engine/test_graphs.py"
GUARD = "engine/test_guard.py engine/test_ema.py engine/test_amp.py"
PROJECT = "ops/test_project.py"
CLIPPED = "engine/test_max_norm.py"
OBJECTIVES = "engine/test_objectives.py"
LAYERS = "kernels/test_layers.py engine/test_piecewise.py verification/test_verify.py"


class Fault(NamedTuple):
    """``old``, which stands once in a file of kernels/, becomes ``new``. The ``first`` tests are asked first."""

    what: str
    file: str
    old: str
    new: str
    first: str = RUN


NO_FAULT = Fault("none", "scores", "def mean_scores(", "def mean_scores(")
FAULTS = [
    # philox
    Fault("high half of the index dropped", "philox", "high = ((index >> 32) & 0xFFFFFFFF)", "high = (index & 0)"),
    Fault("stream word dropped", "philox", "low, high, 0, STREAM)", "low, high, 0, 0)"),
    Fault("23 bits, not 24", "philox", "(word >> 8)", "(word >> 9 << 1)"),
    Fault("scaled to (0, 2)", "philox", "(word >> 8).to(tl.float32) * (1.0 /", "(word >> 8).to(tl.float32) * (2.0 /"),
    Fault("normal numbers of the low index alone", "philox", "high = zero + ((index >> 32)", "high = zero + ((index >> 63)", OBJECTIVES),
    Fault("the same four in each place", "philox", "places.to(tl.uint32), zero", "zero, zero", OBJECTIVES),
    Fault("streams alike", "philox", "zero + NOISE)", "zero + STREAM)", OBJECTIVES),
    Fault("one word for both", "philox", "_box_muller(c, d, acc)", "_box_muller(a, b, acc)", OBJECTIVES),
    Fault("log of zero", "philox", "((a >> 8) + 1)", "(a >> 8)", OBJECTIVES),
    Fault("pairs out of order", "philox", "tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))", "tl.interleave(tl.interleave(first, second), tl.interleave(third, fourth))", OBJECTIVES),
    Fault("variance of one half", "philox", "sqrt(-2.0 *", "sqrt(-1.0 *", OBJECTIVES),
    # arithmetic
    Fault("approximate division", "arithmetic", "tl.div_rn(x, y)", "x / y", CODE),
    Fault("approximate root", "arithmetic", "tl.sqrt_rn(x)", "tl.sqrt(x)", CODE),
    Fault("series of too few terms", "arithmetic", "tl.static_range(13, 1, -1)", "tl.static_range(6, 1, -1)"),
    Fault("1 - beta^t by cancellation", "arithmetic", "x > -0.5, -root * (root + 2)", "x > 1, -root * (root + 2)"),
    Fault("wrong sign in the moving mean", "arithmetic", "mean + complement * change", "mean - complement * change"),
    Fault("beta = 0 not exact", "arithmetic", "tl.where(complement < 0.5,", "tl.where(complement < 2.0,"),
    Fault("a quarter taken for another", "arithmetic", "(4 * turns + 0.5)", "(4 * turns)", OBJECTIVES),
    Fault("sine and cosine exchanged", "arithmetic", "tl.where(odd, -sin, cos), tl.where(odd, cos, sin)", "tl.where(odd, cos, sin), tl.where(odd, -sin, cos)", OBJECTIVES),
    Fault("half turns not negated", "arithmetic", "tl.where(quarter // 2 == 1, -near, near)", "near", OBJECTIVES),
    Fault("sine of too few terms", "arithmetic", "tl.static_range(16, 0, -2)", "tl.static_range(8, 0, -2)", OBJECTIVES),
    # arrival
    Fault("first to arrive adds up", "arrival", "arrived == tl.num_programs(0) - 1", "arrived == 0"),
    Fault("counter not put back", "arrival", "tl.store(counter_ptr, 0)", "tl.store(counter_ptr, 1)"),
    Fault("arrival publishes nothing", "arrival", 'sem="acq_rel"', 'sem="relaxed"', CODE),
    Fault("no barrier before the arrival", "arrival", "    tl.debug_barrier()  #", "    #", CODE),
    Fault("a missing partial", "arrival", "used = slots < tl.num_programs(0)", "used = slots < tl.num_programs(0) - 1"),
    Fault("programs overlap", "arrival", "programs * BLOCK, tl.arange", "BLOCK, tl.arange"),
    Fault("32-bit start", "arrival", "program.to(tl.int64) * BLOCK", "program * BLOCK"),
    Fault("count of the bound not put back", "arrival", 'tl.atomic_xchg(count_ptr, 0, sem="relaxed")', "tl.load(count_ptr)"),
    Fault("share of a step left out", "arrival", 'tl.where(skip, float("nan"), share)', "share", GUARD),
    # layout
    Fault("any layout taken for dense", "layout", "else x.contiguous()", "else x"),
    Fault("lazy negation forgotten", "layout", "x = x.resolve_neg()", "x = x"),
    # scores
    Fault("mask dropped", "scores", "mask = start + lanes < numel", "mask = start + lanes < numel + 1"),
    Fault("block size for mask bound", "scores", "mask = start + lanes < numel", "mask = lanes < numel"),
    Fault("+ for - in the estimate", "scores", "stats_ptr + 2, mean_a - mean_b", "stats_ptr + 2, mean_a + mean_b"),
    Fault("critic's loss negated", "scores", "tl.store(loss_ptr, mean_b - mean_a)", "tl.store(loss_ptr, mean_a - mean_b)"),
    Fault("generator's loss negated", "scores", "tl.store(loss_ptr, -mean_a)", "tl.store(loss_ptr, mean_a)"),
    Fault("labels left out", "scores", "x *= tl.load(y_ptr", "x += tl.load(y_ptr"),
    Fault("hinge's sign", "scores", "= tl.maximum(1 + SIGN * x", "= tl.maximum(1 - SIGN * x"),
    Fault("hinge counts lanes past the end", "scores", '-1.0 * SIGN if FORM == "hinge" else 0.0', "0.0"),
    Fault("hinge swallows NaN", "scores", "(1 + SIGN * x, 0, propagate_nan=tl.PropagateNan.ALL)", "(1 + SIGN * x, 0)"),
    Fault("blocks of scores left out", "scores", "range(first, numel, stride)", "range(first, numel, 2 * stride)", GUARD),
    Fault("mean over the other's count", "scores", "mean_of_partials(partial_ptr + MAX_PROGRAMS, b_numel", "mean_of_partials(partial_ptr + MAX_PROGRAMS, a_numel"),
    # interpolate
    Fault("one eps for the batch", "interpolate", "index = sample + offset", "index = sample * 0 + offset"),
    Fault("one eps per block", "interpolate", "index = sample + offset", "index = program + offset"),
    Fault("offset on the device ignored", "interpolate", "index += tl.load(offset_ptr)", "index += 0"),
    Fault("eps from the wrong end", "interpolate", "fake + eps.to(acc) * (real - fake)", "real + eps.to(acc) * (fake - real)"),
    Fault("+ for -", "interpolate", "(real - fake), mask", "(real + fake), mask"),
    Fault("eps not kept", "interpolate", "if block == 0:", "if block == 1:"),
    Fault("store mask dropped", "interpolate", "(real - fake), mask)", "(real - fake))"),
    Fault("32-bit sample offset", "interpolate", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    Fault("half-precision arithmetic", "interpolate", "real, fake = real.to(acc), fake.to(acc)", "eps = eps.to(real.dtype)"),
    # perturb
    Fault("one noise for the batch", "perturb", "index = sample + offset", "index = sample * 0 + offset", OBJECTIVES),
    Fault("one noise for each block", "perturb", "places = (first // 4).to(tl.int32) + tl.arange", "places = tl.arange", OBJECTIVES),
    Fault("noise of the block's number", "perturb", "(first // 4)", "first", OBJECTIVES),
    Fault("offset on the device ignored", "perturb", "index += tl.load(offset_ptr)", "index += 0", OBJECTIVES),
    Fault("scale on the device ignored", "perturb", "tl.load(scale_ptr).to(acc) if SCALE_ON_DEVICE", "tl.full([], 1, acc) if SCALE_ON_DEVICE", OBJECTIVES),
    Fault("noise subtracted", "perturb", "+ factor * noise", "- factor * noise", OBJECTIVES),
    Fault("mask dropped", "perturb", "x.to(acc) + factor * noise, mask)", "x.to(acc) + factor * noise)", OBJECTIVES),
    Fault("half-precision noise", "perturb", "acc = tl.float64 if x.dtype == tl.float64 else tl.float32", "acc = x.dtype", RUN),
    Fault("32-bit rows", "perturb", "program = tl.program_id(0).to(tl.int64)", "program = tl.program_id(0)"),
    # penalty
    Fault("norm not rooted", "penalty", "        norm = sqrt(tl.sum(g * g, axis=0))", "        norm = tl.sum(g * g, axis=0)"),
    Fault("an eps inside the root", "penalty", "sqrt(tl.sum(squares, axis=0))", "sqrt(tl.sum(squares, axis=0) + 1e-6)"),
    Fault("NaN at zero gradient", "penalty", "tl.where(norm == 0, 0, divide(2 * excess, tl.where(norm == 0, 1, norm)))", "divide(2 * excess, norm)"),
    Fault("cotangent not over the batch", "penalty", "mean(WEIGHT * _phi(norm, KIND, TARGET)[1], batch)\n            tl.store", "WEIGHT * _phi(norm, KIND, TARGET)[1]\n            tl.store"),
    Fault("weight dropped", "penalty", "mean(WEIGHT * _phi(norm, KIND, TARGET)[1], batch)\n            last", "mean(_phi(norm, KIND, TARGET)[1], batch)\n            last"),
    Fault("one-sided is two-sided", "penalty", "value = excess * excess", "value = (norm - TARGET) * (norm - TARGET)"),
    Fault("one-sided slope below target", "penalty", "divide(2 * excess,", "divide(2 * (norm - TARGET),"),
    Fault("power's slope", "penalty", "square, 6 * square * square", "square, 6 * square"),
    Fault("one-sided swallows NaN", "penalty", "tl.maximum(excess, 0, propagate_nan=tl.PropagateNan.ALL)", "tl.maximum(excess, 0)"),
    Fault("second read starts late", "penalty", "for i in range(origin, last + 1):", "for i in range(origin + 1, last + 1):"),
    Fault("last block of a sample left out", "penalty", "for column in range(origin, size, BLOCK):", "for column in range(origin, size - BLOCK, BLOCK):"),
    Fault("padding counted as samples", "penalty", "tl.where(valid, _phi(each, KIND, TARGET)[0], 0)", "_phi(each, KIND, TARGET)[0]"),
    Fault("32-bit sample offset", "penalty", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    Fault("spills", "penalty", "LOOP_BLOCK = 8192", "LOOP_BLOCK = 65536", CODE),
    # table
    Fault("unaligned taken for aligned", "table", "pointer % 16 == 0", "pointer % 2 == 0"),
    Fault("chunks counted from the wrong row", "table", "first += chunks[i]", "first += 1"),
    Fault("last chunk of a tensor left out", "table", "tuple([-(-numel // block) for", "tuple([max(1, numel // block) for"),
    Fault("stale table for moved gradients", "table", "key = (*addresses, counts,", "key = (addresses[0], counts,"),
    Fault("alignment hint lost", "table", "pointer = tl.multiple_of(pointer, 16)", "pointer = pointer", CODE),
    Fault("new hyper-parameters not uploaded", "table", "if rows != self._rows:", "if self._rows is None:"),
    Fault("table allocated within a capture", "table", "table = spares.pop()", "table = torch.empty_like(host, device=device)"),
    Fault("table of a capture filled in it", "table", "    if capturing(out.device) if capture is None else capture:\n        _pending", "    if False:\n        _pending", GRAPHS),
    Fault("least norm taken for the greatest", "penalty", "greatest = tl.maximum(greatest, each)", "greatest = tl.minimum(greatest, each)"),
    Fault("lanes past the end among the least", "penalty", 'tl.where(valid, each, float("inf"))', "each"),
    Fault("extremes hide NaN", "penalty", "tl.where(defined, tl.max(greatest, axis=0), average)", "tl.max(greatest, axis=0)"),
    # update
    Fault("clamp before the update", "update", "    p = tl.maximum(p, -bound, propagate_nan=tl.PropagateNan.ALL)\n    p = tl.minimum(p, bound, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)\n", "    old = tl.load(p_ptr, mask).to(acc)\n    p = (p - old + tl.minimum(tl.maximum(old, -bound), bound)).to(DTYPE)\n"),
    Fault("clamp swallows NaN", "update", "p = tl.maximum(p, -bound, propagate_nan=tl.PropagateNan.ALL)", "p = tl.maximum(p, -bound)"),
    Fault("clamp on one side", "update", "p = tl.maximum(p, -bound, propagate_nan=tl.PropagateNan.ALL)\n", "p = p\n"),
    Fault("eps inside the root", "update", "sqrt(variance) + eps", "sqrt(variance + eps)"),
    Fault("gradient not squared", "update", "beta2_c * g * g", "beta2_c * g"),
    Fault("sign of the step", "update", "p -= lr * change", "p += lr * change"),
    Fault("maximize ignored", "update", "g = sign * factor * tl.load", "g = factor * tl.load"),
    Fault("decay of an infinite weight", "update", "if decay != 0:", "if decay == decay:"),
    Fault("centered variance below zero", "update", "tl.maximum(s - m * m, 0, propagate_nan=tl.PropagateNan.ALL)", "s - m * m"),
    Fault("momentum overwritten", "update", "change += tl.load(hyper_ptr + table.MOMENTUM)", "change = tl.load(hyper_ptr + table.MOMENTUM)"),
    Fault("bias correction of the old step", "update", ".to(factor.dtype) + 1", ".to(factor.dtype)"),
    Fault("bias corrections exchanged", "update", "divide(lr, bias1) * divide(m, divide(sqrt(s), sqrt(bias2)) + eps)", "divide(lr, bias2) * divide(m, divide(sqrt(s), sqrt(bias1)) + eps)"),
    Fault("state not stored", "update", "            tl.store(m_ptr, m.to(DTYPE), mask)\n", "            if not CENTERED:\n                tl.store(m_ptr, m.to(DTYPE), mask)\n"),
    Fault("lanes past the end counted", "update", "        on_bound &= mask", "        on_bound &= lanes >= 0"),
    Fault("mask of the block, not the tensor", "update", "lanes < numel - start", "lanes < BLOCK"),
    Fault("part of a chunk left out", "update", "tl.minimum(start + BLOCK, numel), BLOCK // 4)", "tl.minimum(start + BLOCK, numel), BLOCK // 2)"),
    Fault("full path for part of a block", "update", "(start + BLOCK <= numel)", "(start <= numel)"),
    Fault("steps of the first tensors alone", "update", "mask = slots < tensors", "mask = slots < tl.minimum(tensors, STEPS_BLOCK)"),
    Fault("steps counted twice", "update", "mask, other=0) + 1, mask)", "mask, other=0) + 2, mask)"),
    Fault("first group's numbers for all", "update", "tl.load(row_ptr + table.HYPER_ROW) *", "0 * tl.load(row_ptr + table.HYPER_ROW) *"),
    Fault("float32 state in float64", "update", "p = tl.load(p_ptr, mask).to(acc)", "p = tl.load(p_ptr, mask).to(tl.float32).to(acc)"),
    Fault("gate ignored", "update", "tl.where(skip, 0, tl.load(row_ptr + table.NUMEL))", "tl.load(row_ptr + table.NUMEL)", GUARD),
    Fault("steps left out are counted", "update", "tl.where(skip, 0, tensors)", "tensors", GUARD),
    Fault("factor ignored", "update", "g = sign * factor * tl.load", "g = sign * tl.load", GUARD),
    Fault("average of the weights before", "update", "tl.load(e_ptr, mask), p.to(acc),", "tl.load(e_ptr, mask), tl.load(p_ptr, mask).to(acc) * 0 + p.to(acc) * 2,", GUARD),
    Fault("average's decay for its complement", "update", "hyper_ptr + table.KEPT), tl.load(hyper_ptr + table.KEPT_C)", "hyper_ptr + table.KEPT_C), tl.load(hyper_ptr + table.KEPT)", GUARD),
    Fault("average not stored", "update", "        tl.store(e_ptr, e, mask)\n", "", GUARD),
    # guard
    Fault("infinity taken for finite", "guard", 'tl.abs(g) < float("inf")', 'tl.abs(g) <= float("inf")', GUARD),
    Fault("NaN taken for finite", "guard", 'tl.where(tl.abs(g) < float("inf"), 0, 1)', 'tl.where(tl.abs(g) == float("inf"), 1, 0)', GUARD),
    Fault("-infinity taken for finite", "guard", "tl.abs(g) <", "g <", GUARD),
    Fault("lanes past the end looked at", "guard", "mask = lanes < numel - start", "mask = lanes < numel", GUARD),
    Fault("tail of a gradient left out", "guard", "(start + BLOCK <= numel)", "(start <= numel)", GUARD),
    Fault("chunks counted, not elements", "guard", "tally_ptr + COUNT, found.to(tl.int64)", "tally_ptr + COUNT, (found > 0).to(tl.int64)", GUARD),
    Fault("last tensor for the first", "guard", "tl.atomic_max(tally_ptr + REACHED, tensors - tl.load(row_ptr + table.HYPER_ROW)", "tl.atomic_max(tally_ptr + REACHED, 1 + tl.load(row_ptr + table.HYPER_ROW)", GUARD),
    Fault("count not put back", "guard", 'tl.atomic_xchg(tally_ptr + COUNT, 0, sem="relaxed")', "tl.load(tally_ptr + COUNT)", GUARD),
    Fault("first tensor not put back", "guard", 'tl.atomic_xchg(tally_ptr + REACHED, 0, sem="relaxed")', "tl.load(tally_ptr + REACHED)", GUARD),
    Fault("a good step does not end a row", "guard", "tl.load(tally_ptr + IN_A_ROW) + 1, 0)", "tl.load(tally_ptr + IN_A_ROW) + 1, tl.load(tally_ptr + IN_A_ROW))", GUARD),
    Fault("every step counted as left out", "guard", "tl.load(tally_ptr + SKIPPED) + skip.to(tl.int64)", "tl.load(tally_ptr + SKIPPED) + 1", GUARD),
    Fault("longest row forgotten", "guard", "tl.maximum(tl.load(tally_ptr + LONGEST), row)", "row", GUARD),
    Fault("gate always open", "guard", "tl.store(gate_ptr, skip.to(tl.float32))", "tl.store(gate_ptr, 0.0)", GUARD),
    Fault("scale for its inverse", "guard", "factor / scale)", "scale)", GUARD),
    Fault("scale not halved", "guard", "tl.maximum(0.5 * scale, LEAST_SCALE)", "scale", GUARD),
    Fault("scale shrinks to nothing", "guard", "tl.maximum(0.5 * scale, LEAST_SCALE)", "0.5 * scale", GUARD),
    Fault("scale not doubled", "guard", "tl.minimum(2 * scale, MOST_SCALE)", "scale", GUARD),
    Fault("scale grows without end", "guard", "tl.minimum(2 * scale, MOST_SCALE)", "2 * scale", GUARD),
    Fault("scale doubled a step late", "guard", "served >= GROWTH_INTERVAL", "served > GROWTH_INTERVAL", GUARD),
    Fault("an overflow does not end the scale's service", "guard", "tl.where(skip | grown, 0, served)", "tl.where(grown, 0, served)", GUARD),
    Fault("fake scores for real ones", "guard", "store_sums(partial_ptr, a_ptr, b_ptr, a_numel, b_numel", "store_sums(partial_ptr, b_ptr, a_ptr, b_numel, a_numel", GUARD),
    Fault("guard's generator loss negated", "guard", "-mean_of_partials(partial_ptr, a_numel", "mean_of_partials(partial_ptr, a_numel", GUARD),
    Fault("scores shared by more programs than sum them", "guard", "tl.minimum(tl.num_programs(0), MAX_PROGRAMS)", "tl.num_programs(0)", GUARD),
    Fault("blocks of one size in tables of another", "guard", "addresses(own, block, members, capture=capture)", "addresses(own, BLOCK, members, capture=capture)", GUARD),
    Fault("verdict before the last dtype", "guard", "        if FINAL:\n", "        if True:\n", GUARD),
    Fault("norm of the last dtype's gradients", "guard", "squares_ptr + before + program", "squares_ptr + program", CLIPPED),
    Fault("norm of the first chunks", "guard", "for first in range(0, before + chunks,", "for first in range(0, tl.minimum(before + chunks, 4 * MAX_PROGRAMS),", CLIPPED),
    Fault("norm of the scaled gradients", "guard", "tl.sqrt(tl.sum(sums, axis=0)) / scale", "tl.sqrt(tl.sum(sums, axis=0))", CLIPPED),
    Fault("a float64 norm clipped to a float32 bound", "guard", "tl.full([], MAX_NORM, tl.float64)", "tl.full([], MAX_NORM, tl.float32).to(tl.float64)", CLIPPED),
    Fault("factor of a step that is left out", "guard", "tl.where(skip, factor, tl.minimum(", "tl.where(False, factor, tl.minimum(", CLIPPED),
    # project
    Fault("gate ignored", "project", "tl.where(skip, 0, tl.load(entry_ptr + table.HYPER_ROW))", "tl.load(entry_ptr + table.HYPER_ROW)", PROJECT),
    Fault("norm not rooted", "project", "root = sqrt(square)", "root = square", PROJECT),
    Fault("rows within scaled, too", "project", "    if finite & (norm > bound):", "    if finite & (norm > 0):", PROJECT),
    Fault("onto the unit sphere", "project", "(w * inverse * bound)", "(w * inverse)", PROJECT),
    Fault("half of the bound", "project", "(w * inverse * bound)", "(w * inverse * bound * 0.5)", PROJECT),
    Fault("rows on their bound not counted", "project", "(finite & (norm >= bound))", "(finite & (norm > bound))", PROJECT),
    Fault("elements on their bound not counted", "project", "mask & finite & (norms >= bound)", "mask & finite & (norms > bound)", PROJECT),
    Fault("lanes past the end counted", "project", "(mask & finite & (norms >= bound))", "(finite & (norms >= bound))", PROJECT),
    Fault("store mask dropped", "project", ".to(DTYPE), mask & finite & (norms > bound))", ".to(DTYPE), finite & (norms > bound))", PROJECT),
    Fault("sign of an element lost", "project", "tl.where(w < 0, -bound, bound)", "tl.where(w < 0, bound, bound)", PROJECT),
    Fault("an infinite element clamped", "project", 'finite = norms < float("inf")', 'finite = norms <= float("inf")', PROJECT),
    Fault("a row with an infinity zeroed", "project", 'finite = root < float("inf")', 'finite = root <= float("inf")', PROJECT),
    Fault("overflowing squares", "project", 'if (square == float("inf")) | (square < least):', "if square < least:", PROJECT),
    Fault("vanishing squares", "project", 'if (square == float("inf")) | (square < least):', 'if square == float("inf"):', PROJECT),
    Fault("scaled the wrong way", "project", "tl.where(square < least, tl.full([], shift, ACC), tl.full([], 1 / shift, ACC))", "tl.where(square < least, tl.full([], 1 / shift, ACC), tl.full([], shift, ACC))", PROJECT),
    Fault("norm of the scaled row", "project", "norm = divide(root, scale)", "norm = root", PROJECT),
    Fault("part of a row left out of its norm", "project", "for column in range(0, size, BLOCK):\n        left", "for column in range(0, tl.minimum(size, BLOCK), BLOCK):\n        left", PROJECT),
    Fault("part of a row not projected", "project", "for column in range(0, size, BLOCK):\n            left", "for column in range(0, tl.minimum(size, BLOCK), BLOCK):\n            left", PROJECT),
    Fault("neighbours in the norm", "project", "w = scale * tl.load(w_ptr + column, lanes < left, other=0).to(scale.dtype)", "w = scale * tl.load(w_ptr + column, lanes < left + 1, other=0).to(scale.dtype)", PROJECT),
    Fault("neighbours projected", "project", "(w * inverse * bound).to(DTYPE), lanes < left)", "(w * inverse * bound).to(DTYPE), lanes < left + 1)", PROJECT),
    Fault("a float64 norm compared with a float32 bound", "project", "bound = tl.full([], BOUND, ACC)  # in a", "bound = BOUND  # in a", PROJECT),
    Fault("row taken for another", "project", "table.PARAM, row * size, lanes", "table.PARAM, row * BLOCK, lanes", PROJECT),
    Fault("rows that end elsewhere taken for aligned", "project", "if ALIGNED:", "if True:", PROJECT),
    Fault("vectors in chunks of a block", "project", "chunks = [block // 4 if", "chunks = [block if", PROJECT),
    Fault("factor of the row's size hidden", "project", "size = size // width * width", "size = size", CODE),
    # activation
    Fault("bias forgotten", "activation", "    if BIAS:\n", "    if False:\n", LAYERS),
    Fault("swallows NaN", "activation", "h = tl.maximum(h, 0, propagate_nan=tl.PropagateNan.ALL)", "h = tl.maximum(h, 0)", LAYERS),
    Fault("slope at zero", "activation", "s = tl.where(h <= 0, 0, s)", "s = tl.where(h < 0, 0, s)", LAYERS),
    Fault("slope of zero at NaN", "activation", "s = tl.where(h <= 0, 0, s)", "s = tl.where(h > 0, s, 0)", LAYERS),
    Fault("slope of one at NaN", "activation", "s = tl.where(h > 0, s, SLOPE * s)", "s = tl.where(h <= 0, SLOPE * s, s)", LAYERS),
    Fault("rectified before the slope is taken", "activation", "        s = tl.where(h > 0, s, SLOPE * s)\n        h = tl.where(h > 0, h, SLOPE * h)\n", "        h = tl.where(h > 0, h, SLOPE * h)\n        s = tl.where(h > -0.1, s, SLOPE * s)\n", LAYERS),
    Fault("dropout left out of h", "activation", "s, h = s * f, h * f", "s, h = s * f, h", LAYERS),
    Fault("dropout left out of delta", "activation", "s, h = s * f, h * f", "s, h = s, h * f", LAYERS),
    Fault("seeds of the first rows", "activation", "seeds_ptr + row,", "seeds_ptr + row % ROWS,", LAYERS),
    Fault("weights of the first columns", "activation", "top_ptr + column,", "top_ptr + column % COLUMNS,", LAYERS),
    Fault("last columns left out", "activation", "tl.cdiv(columns, COLUMNS)\n", "tl.maximum(columns // COLUMNS, 1)\n", LAYERS),
    # batchnorm
    Fault("mean of the first rows", "batchnorm", "        for first in range(0, rows, ROWS):\n            at, inside = _tile(first, rows, columns, column, ROWS)\n            total +=", "        for first in range(0, ROWS, ROWS):\n            at, inside = _tile(first, rows, columns, column, ROWS)\n            total +=", LAYERS),
    Fault("variance over N - 1", "batchnorm", "var = mean(squares, rows)\n", "var = mean(squares, rows - 1)\n", LAYERS),
    Fault("biased running variance", "batchnorm", "mean(squares, rows - 1), own)", "mean(squares, rows), own)", LAYERS),
    Fault("rows past the end in the variance", "batchnorm", "tl.where(inside, x * x, 0)", "x * x", LAYERS),
    Fault("variance by cancellation", "batchnorm", "to(acc) - center[None, :]\n            total += tl.where(inside, x * x, 0)\n        squares = tl.sum(total, axis=0)\n", "to(acc)\n            total += x * x\n        squares = tl.sum(total, axis=0) - center * center * rows\n", LAYERS),
    Fault("eps outside the root", "batchnorm", "sqrt(var + EPS)", "sqrt(var) + EPS", LAYERS),
    Fault("momentum for its complement", "batchnorm", "(1 - momentum) * old_mean + momentum * center", "momentum * old_mean + (1 - momentum) * center", LAYERS),
    Fault("cumulative average over the old count", "batchnorm", "tracked.to(acc))", "tracked.to(acc) - 1)", LAYERS),
    Fault("batches not counted", "batchnorm", "tl.store(tracked_ptr, tracked)", "tl.store(tracked_ptr, tracked - 1)", LAYERS),
    Fault("counted by each program", "batchnorm", "if is_last(counter_ptr):", "if True:", LAYERS),
    Fault("swallows NaN", "batchnorm", "y = tl.maximum(y, 0, propagate_nan=tl.PropagateNan.ALL)", "y = tl.maximum(y, 0)", LAYERS),
    Fault("zero times infinity", "batchnorm", "if SLOPE == 0:\n            y =", "if False:\n            y =", LAYERS),
    Fault("slope at zero", "batchnorm", "d = tl.where(y <= 0, 0, d)", "d = tl.where(y < 0, 0, d)", LAYERS),
    Fault("slope of zero at NaN", "batchnorm", "d = tl.where(y <= 0, 0, d)", "d = tl.where(y > 0, d, 0)", LAYERS),
    Fault("slope of one at NaN", "batchnorm", "d = tl.where(y > 0, d, SLOPE * d)", "d = tl.where(y <= 0, SLOPE * d, d)", LAYERS),
    Fault("slope forgotten in the gradients", "batchnorm", "d = tl.where(y > 0, d, SLOPE * d)", "d = d", LAYERS),
    Fault("weight's gradient is the bias's", "batchnorm", "of_weight += d * xhat", "of_weight += d", LAYERS),
    Fault("bias's gradient not subtracted", "batchnorm", "d -= mean(dbias, rows)[None, :] + xhat", "d -= xhat", LAYERS),
    Fault("weight's gradient not subtracted", "batchnorm", " + xhat * mean(dweight, rows)[None, :]", "", LAYERS),
    Fault("sums in evaluation", "batchnorm", "        if OF_BATCH:\n            d -=", "        if True:\n            d -=", LAYERS),
    Fault("weight forgotten in the gradient", "batchnorm", "factor *= tl.load(weight_ptr + column, own, other=0).to(center.dtype)", "factor *= 1", LAYERS),
    Fault("last columns left out", "batchnorm", "triton.cdiv(columns, COLUMNS)", "max(columns // COLUMNS, 1)", LAYERS),
    Fault("sums in half precision", "batchnorm", "x.shape[1], dtype=accumulator(x.dtype)", "x.shape[1], dtype=x.dtype", LAYERS),
]  # fmt: skip


def source(fault: Fault) -> Path:
    """The file that a fault is planted in, relative to the tree."""
    return Path("kernels") / f"{fault.file}.py"


def plant(fault: Fault, tree: Path) -> None:
    """Write the faulty file.

    Raises:
        ValueError: what is to be replaced does not stand there exactly once.
    """
    text = (ROOT / source(fault)).read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.file}: {fault.what}: expected once, got {text.count(fault.old)} times: {fault.old!r}")
    (tree / source(fault)).write_text(text.replace(fault.old, fault.new))


def caught_by(fault: Fault) -> str:
    """The test that fails first with the fault planted, or "" if none does."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignore = shutil.ignore_patterns(".git", "__pycache__", "runs", "*.egg-info", "build", ".*_cache", ".benchmarks")
        shutil.copytree(ROOT, tree, ignore=ignore)
        (tree / "fastwgan" / "kernels").symlink_to("../kernels")
        plant(fault, tree)
        env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        env["FASTWGAN_KERNELS"] = "interpreter"  # compiles nothing
        for suite in sorted((RUN, PROJECT, OBJECTIVES, GUARD, CLIPPED, LAYERS, GRAPHS, CODE), key=fault.first.__ne__):
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--deselect"]
            # Which any change fails.
            command.append("tests/tools/test_compiled.py::test_generated_code_is_the_committed")
            files = [f"tests/{name}" for name in suite.split()]
            try:
                run = subprocess.run(
                    [*command, *files], cwd=tree, env=env, capture_output=True, text=True, check=False, timeout=1200
                )
            except subprocess.TimeoutExpired:
                return "no end"
            if run.returncode:
                found = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
                return found.group(1) if found else f"no import: {run.stdout.strip().splitlines()[-1]}"
    return ""


def main(numbers: list[int]) -> int:
    """Plant the faults; return the exit status."""
    if test := caught_by(NO_FAULT):
        print(f"without a fault, {test} fails")
        return 1
    chosen = numbers or list(range(1, len(FAULTS) + 1))
    found = dict(re.findall(r"^\| \d+ \| (\w+ \| .+?) \| (.+) \|$", TABLE.read_text(), re.MULTILINE))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, test in zip(chosen, pool.map(lambda i: caught_by(FAULTS[i - 1]), chosen), strict=True):
            fault = FAULTS[i - 1]
            found[f"{fault.file} | {fault.what}"] = f"`{test}`" if test else "**none**"
            print(f"{i} {fault.file}: {fault.what}: {test or 'SURVIVES'}", flush=True)
    keys = [f"{fault.file} | {fault.what}" for fault in FAULTS]
    rows = [f"| {i} | {key} | {found.get(key, '**not planted**')} |" for i, key in enumerate(keys, 1)]
    caught = sum("`" in row for row in rows)
    TABLE.write_text(
        f"Faults planted in the kernels by `tests/tools/mutate.py`, one at a time: {caught} of {len(rows)} caught.\n\n"
        "| | kernel file | fault | first test to fail |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    return int(caught < len(rows))


if __name__ == "__main__":
    sys.exit(main([int(n) for n in sys.argv[1:]]))
