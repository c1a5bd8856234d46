"""Plants faults in a copy of the kernels, one at a time, and shows which test catches each.

    python tests/kernels/planted_faults.py              all of them: an hour
    python tests/kernels/planted_faults.py tail cross   those whose name contains a word

What a run that was stopped has found is kept in out/planted_faults.json, for as long as kernels and tests stay as they
are.

Exits with 1 if a fault that matters goes unseen, or a harmless one is reported. Only a test that fails counts, or
crashes: not one that cannot be collected. Faults that the interpreter cannot see are for the tests of what the
compiler makes.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copytree, ignore_patterns

TESTS = Path(__file__).parent
PACKAGE = TESTS.parents[1] / "kernels" / "alignkit_kernels"
KNOWN = TESTS.parents[1] / "out" / "planted_faults.json"
TESTERS, COMPILER, HARMLESS = "interpreter", "compiler", "harmless"
# quick tests first: the first failure ends a run
FILES = "test_philox.py", "test_noise.py", "test_errors.py", "test_preference.py", "test_ops.py"

# name, file, what stands there, what the fault makes of it, and who sees it (the interpreter unless said)
FAULTS = [
    # harmless ones first: they also show that the copy's tests pass
    ("tiles of half the size", "layout.py", "NUM_WARPS, PARTS = 256, 128, 1, 2", "NUM_WARPS, PARTS = 128, 64, 1, 2",
     HARMLESS),
    ("the loop in three parts", "layout.py", "NUM_WARPS, PARTS = 256, 128, 1, 2", "NUM_WARPS, PARTS = 256, 128, 1, 3",
     HARMLESS),
    ("other stages and parts", "launch.py", "stages: int = 4\n    backward_parts: int = 4",
     "stages: int = 2\n    backward_parts: int = 1", HARMLESS),
    ("tail mask one too long", "tiles.py", "place < left", "place <= left"),
    ("tail never masked", "tiles.py", "return place, place < left", "return place, place >= 0"),
    ("last channel dropped", "errors/kernel.py", "tl.range(begin, end,", "tl.range(begin, end - 1,"),
    ("second part of the loop dropped", "tiles.py", "first = part * steps", "first = part * loop"),
    ("lost factor 2 in the gap", "errors/kernel.py", "- 2 * target)", "- target)"),
    ("lost factor 2 in the gradient", "tiles.py", "low = 2 * (", "low = ("),
    ("gap by subtracting squares", "errors/kernel.py", "(pred - reference) * (pred + reference - 2 * target)",
     "((pred - target) * (pred - target) - (reference - target) * (reference - target))"),
    ("gradient of the gap forgotten", "tiles.py",
     "high = 2 * (high + tl.load(weights_ptr + second + last).to(DTYPE))", "high = 2 * high"),
    ("sample offset lost", "errors/kernel.py", "sample * pred_row", "0 * pred_row"),
    ("slab offset lost", "errors/kernel.py", "(slab * loop + i) * inner", "i * inner"),
    ("accumulated in fp16", "errors/kernel.py", "error += (pred - target) * (pred - target)",
     "error += ((pred - target) * (pred - target)).to(tl.float16).to(DTYPE)"),
    ("count without channels", "errors/kernel.py", "tl.sum(held.to(tl.int32)) * (end - begin)",
     "tl.sum(held.to(tl.int32)) * 1"),
    ("ignored label counted", "errors/kernel.py", "held = labels == k",
     "held = (labels == k) | (labels >= num_regions)"),
    ("padding counted as region 0", "tiles.py", "tl.where(inside, labels, -1)", "tl.where(inside, labels, 0)"),
    ("ignored label trained on", "errors/kernel.py", "tl.where(held, weight * (pred - (c * noise + d * clean)), 0.0)",
     "tl.where(labels >= 0, (pred - (c * noise + d * clean)), 0.0)"),
    ("label map of the first sample for all", "tiles.py", "sample * label_batch", "0 * label_batch"),
    ("label map of the first slab for all", "tiles.py", "slab * label_slab", "0 * label_slab"),
    ("upcast lost", "tiles.py", "mask=inside, other=0.0).to(DTYPE)", "mask=inside, other=0.0)"),
    ("32-bit offsets", "tiles.py", "tl.load(first + place,", "tl.load(ptr + (row + element).to(tl.int32) + place,"),
    ("32-bit offsets of what is written", "tiles.py", "tl.store(first + place,",
     "tl.store(ptr + (row + element).to(tl.int32) + place,", COMPILER),
    ("clean latent forgotten on the path", "tiles.py", "(noise - a * clean) * inverse_s", "noise * inverse_s"),
    ("partial sums of later tiles dropped", "tiles.py", "range(0, programs, BLOCK)", "range(0, 1)"),
    ("second stage summed in fp32", "tiles.py", "total += part.to(tl.float64)",
     "total = (total.to(tl.float32) + part.to(tl.float32)).to(tl.float64)"),
    ("finalise drops its last number", "tiles.py", "start + place < programs,",
     "start + place < programs - 1,"),
    ("noise repeated in every tile", "noise/device.py", "counter = (start // 4)", "counter = (0 * start)"),
    ("noise counter reused across draws", "noise/device.py", "tl.load(row + 2)", "tl.load(row + 1)"),
    ("noise counter reused across streams", "noise/device.py", "tl.load(row + 3)", "tl.load(row + 2)"),
    ("normals of a counter out of order", "noise/device.py", "tl.interleave(tl.interleave(a, c), tl.interleave(b, d))",
     "tl.interleave(tl.interleave(a, b), tl.interleave(c, d))"),
    ("odd samples take the wrong word", "noise/device.py", "late, odd = element & 2 == 2,",
     "late, odd = element & 2 == 0,"),
    ("sine in the wrong quadrant", "noise/device.py", "tl.where(quadrant & 2 == 2, -across, across)", "across"),
    ("winner's target for the loser's gap", "pairs/kernel.py", "(pred_l + ref_l - 2 * target_l)",
     "(pred_l + ref_l - 2 * target_w)"),
    ("winner and loser swapped in the gradient", "pairs/op.py", "return dpred_w, dpred_l,", "return dpred_l, dpred_w,"),
    ("cross term's gradient lost", "pairs/kernel.py", "dpred_l += weight_cross * residual_w", "dpred_l += 0.0"),
    ("loser's own noise ignored", "pairs/launch.py", "SHARED=noise_l is None", "SHARED=True"),
    ("silent fallback to the reference", "errors/op.py", "run = launch if dispatch.runs_kernels(pred) else plain",
     "run = plain"),
    ("silent fallback of the backward", "pairs/op.py", "run = launch if dispatch.runs_kernels(pred_w) else plain",
     "run = plain"),
    ("fake kernel of another dtype", "errors/op.py", "args[6]), dtype=torch.float64",
     "args[6]), dtype=torch.float32"),
    ("gradient of the wrong input saved", "errors/op.py", "ctx.save_for_backward(pred, clean,",
     "ctx.save_for_backward(clean, pred,"),
    ("vector loads lost", "tiles.py", "left = tl.multiple_of(left, 8)", "left = left", COMPILER),
    ("cosine through local memory", "noise/device.py", "cosine, sine = circle(folded_uniform(second))",
     "cosine, sine = tl.cos(6.2831853 * folded_uniform(second)), tl.sin(6.2831853 * folded_uniform(second))", COMPILER),
    ("sums compiled anew for a new size", "tiles.py",
     "@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=POINTERS)\ndef sum_tiles",
     "@triton.jit\ndef sum_tiles", COMPILER),
    ("halves of a batch copied", "layout.py", "if not x[0].is_contiguous():\n        x = x.contiguous()",
     "x = x.clone(memory_format=torch.contiguous_format)"),
    ("a number read on the host", "errors/launch.py", "batch = pred.shape[0]\n",
     "batch = pred.shape[0] + int(coefficients.sum().item()) * 0\n"),
    ("words of a key mixed up", "sources.py", '"sample_ids": ids, "draw": key.draw',
     '"draw": key.draw, "sample_ids": ids'),
    ("row of the first sample in the gradient of errors", "errors/kernel.py",
     "num_regions, DTYPE, True)\n    a, inverse_s, c, d = load_coefficients(coefficients_ptr, sample, DTYPE)",
     "num_regions, DTYPE, True)\n    a, inverse_s, c, d = load_coefficients(coefficients_ptr, 0 * sample, DTYPE)"),
    ("row of the first sample in pairs", "pairs/kernel.py",
     "# fmt: skip\n    a, inverse_s, c, d = load_coefficients(coefficients_ptr, sample, DTYPE)",
     "# fmt: skip\n    a, inverse_s, c, d = load_coefficients(coefficients_ptr, 0 * sample, DTYPE)"),
    ("row of the first sample in the gradient of pairs", "pairs/kernel.py",
     "DTYPE, False)\n    a, inverse_s, c, d = load_coefficients(coefficients_ptr, sample, DTYPE)",
     "DTYPE, False)\n    a, inverse_s, c, d = load_coefficients(coefficients_ptr, 0 * sample, DTYPE)"),
    ("loser's noise strides like the winner's", "pairs/kernel.py", "noise_l_ptr, sample * noise_l_row, element",
     "noise_l_ptr, sample * noise_w_row, element"),
    ("loser's own key ignored in the gradient", "pairs/kernel.py",
     "key_l = load_key(noise_l_ptr, sample * noise_l_row, SOURCE_L)\n\n    for", "key_l = key_w\n\n    for"),
    ("strides of coefficients ignored", "pairs/launch.py", "coefficients.contiguous()", "coefficients"),
    ("importance lost in the gradient", "tiles.py", "share *= tl.load(importance_ptr + sample).to(DTYPE)",
     "share *= 1"),
    ("gradient of a pair's own loss lost", "tiles.py", "factor += tl.load(by_pair_ptr + sample).to(DTYPE)",
     "factor += 0.0"),
    ("region's and whole's weights swapped", "preference/kernel.py", "region_weight, global_weight =",
     "global_weight, region_weight ="),
    ("safeguard lost in the gradient", "preference/kernel.py", "-2.0 * kept * by_g", "-2.0 * by_g"),
    ("strength lost", "preference/kernel.py", "z_region = factor * z_region", "z_region = 1.0 * z_region"),
    ("strength lost in the gradient", "preference/kernel.py", "region_weight * factor * by_region_gap",
     "region_weight * by_region_gap"),
    ("small losses rounded", "preference/kernel.py",
     "tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))",
     "tl.log(u)"),
    ("a mask's 255 is a label", "tiles.py", "labels = tl.minimum(labels, highest)", "labels = tl.minimum(labels, 255)"),
    ("samples read from where no vector starts", "layout.py",
     "x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16",
     "x.data_ptr() % 16", COMPILER),
    ("fused multiplications left to the default", "dispatch.py", ", enable_fp_fusion=False)", ")", COMPILER),
    ("labels read from where no vector starts", "layout.py", "regions.data_ptr() % VECTOR == 0", "True", COMPILER),
    ("latents read from where no vector starts", "layout.py", "if aligned and (x.data_ptr()",
     "if aligned and x.dim() == 0 and (x.data_ptr()", COMPILER),
]  # fmt: skip


def planted(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the package with every occurrence of `old` replaced; its source root."""
    root = Path(folder, "kernels")
    copytree(PACKAGE, root / "alignkit_kernels", ignore=ignore_patterns("__pycache__"))
    path = root / "alignkit_kernels" / file
    path.write_text(path.read_text().replace(old, new))
    return root


def moved(faults: list) -> list[str]:
    """Names of those whose place in the kernels is gone."""
    return [name for name, file, old, *_ in faults if old not in (PACKAGE / file).read_text()]


def catcher(root: Path, seen_by: str) -> str | None:
    """The first test that fails on the copy, or None if all pass. Anything else ends the script."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1"}
    files, options = FILES, ["-k", "triton"]
    if seen_by == COMPILER:
        environment["TRITON_INTERPRET"] = "0"
        files, options = ("test_variants.py", "test_compiled.py"), ["-k", "sm_90 or variants"]
    command = [sys.executable, "-m", "pytest", "-x", "-v", "-rf", "-p", "no:cacheprovider", *options]
    command += [str(TESTS / name) for name in files]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=TESTS.parents[1])
    if answer.returncode == 0:
        return None
    failed = re.findall(r"^FAILED \S+::(\S+)", answer.stdout, re.M)
    if answer.returncode == 1 and failed:
        return failed[0]
    running = re.findall(r"in (test_\w+)$", answer.stderr, re.M)  # the stack that pytest prints of a crash
    if -answer.returncode in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS) and running:
        return f"{running[0]} ({signal.Signals(-answer.returncode).name})"
    raise SystemExit(f"pytest ended with {answer.returncode}:\n{answer.stdout[-3000:]}{answer.stderr[-3000:]}")


def digest() -> str:
    """Of what verdicts depend on beside the fault itself: the kernels and the tests."""
    found = hashlib.sha256()
    for path in sorted([*PACKAGE.rglob("*.py"), *TESTS.glob("*.py"), TESTS / "budget.json"]):
        if path != Path(__file__).resolve():
            found.update(path.read_bytes())
    return found.hexdigest()


def main() -> int:
    words, unseen = sys.argv[1:], 0
    chosen = [fault for fault in FAULTS if not words or any(word in fault[0] for word in words)]
    if gone := moved(chosen):
        raise SystemExit(f"the kernels no longer contain the places of: {', '.join(gone)}")
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    if known.get("of") != digest():
        known = {"of": digest(), "caught by": {}}
    caught = known["caught by"]  # by the whole fault, which may be mended between two runs
    if any(COMPILER in fault and json.dumps(fault) not in caught for fault in chosen):
        with tempfile.TemporaryDirectory() as folder:
            test = catcher(planted(folder, "__init__.py", "", ""), COMPILER)
        if test:
            raise SystemExit(f"{test} fails without any fault")
    for fault in chosen:
        name, file, old, new, *seen_by = fault
        seen_by, key = seen_by[0] if seen_by else TESTERS, json.dumps(fault)
        if key not in caught:
            with tempfile.TemporaryDirectory() as folder:
                caught[key] = catcher(planted(folder, file, old, new), seen_by)
            KNOWN.parent.mkdir(exist_ok=True)
            KNOWN.write_text(json.dumps(known, indent=1))
        test = caught[key]
        verdict = test or ("harmless, as it should be" if seen_by == HARMLESS else "NOT CAUGHT")
        unseen += (test is None) != (seen_by == HARMLESS)
        print(f"{name:50} {file:20} {verdict}", flush=True)
    print(f"{len(chosen) - unseen} of {len(chosen)} as expected")
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
