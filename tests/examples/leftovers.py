#!/usr/bin/env python3
"""Tensors that a model does not know: refused by name in every command, but for the few that change nothing, which the
JSON lists."""

import json
import pathlib
import shutil
import struct
import sys
import tempfile

from commands import check, failures, run

inherit, sd35, demo, deit, dit, attention_map = (pathlib.Path(p) for p in sys.argv[2:8])
data = pathlib.Path(sys.argv[1])


def read(path: pathlib.Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write(path: pathlib.Path, tensors: dict, body: bytes) -> None:
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def with_tensors(source: pathlib.Path, target: pathlib.Path, added: dict[str, list[int]], prefix: str = "") -> None:
    """A copy below a prefix, with further F16 tensors of ones."""
    tensors, body = read(source)
    tensors = {name if name == "__metadata__" else prefix + name: value for name, value in tensors.items()}
    for name, shape in added.items():
        count = 1
        for extent in shape:
            count *= extent
        tensors[name] = {"dtype": "F16", "shape": shape, "data_offsets": [len(body), len(body) + 2 * count]}
        body += b"\x00\x3c" * count
    write(target, tensors, body)


def refuses(what: str, words: list[str], output: pathlib.Path | None, *command) -> None:
    result = run(*command)
    lines = [line for line in result.stderr.splitlines() if all(word in line for word in words)]
    ok = result.returncode == 2 and len(lines) == 1 and (output is None or not output.exists())
    check(f"{what}: {lines[0] if lines else ''}", ok, f"exit code {result.returncode}, wanted {words}\n{result.stderr}")


def draws(what: str, expected: dict[str, int], reference: bytes | None, output: pathlib.Path, *command) -> bytes:
    """The picture, the same as the reference; the JSON lists these names with their counts."""
    result = run(*command, "--json")
    if result.returncode != 0:
        check(what, False, result.stderr)
        return b""
    facts = json.loads(result.stdout)
    listed = {line["names"]: line["count"] for line in facts["ignored_tensors"]}
    check(f"{what}: the JSON lists what is ignored", expected.items() <= listed.items(), json.dumps(facts, indent=1))
    check(f"{what}: each with a reason", all(line["reason"] and line["file"] for line in facts["ignored_tensors"]))
    picture = output.read_bytes()
    output.unlink()
    check(f"{what}: the picture is the same", reference is None or picture == reference)
    return picture


def test_sd35(scratch: pathlib.Path) -> None:
    tiny, png, original = scratch / "sd35", scratch / "sd35.png", data / "sd35-tiny"
    shutil.copytree(original, tiny)
    command = [sd35, "-m", tiny, "-W", 64, "-H", 64, "--steps", 1, "-t", 1, "-p", "a red fox", "-o", png]
    reference = draws("linattn-sd35", {"encoder.*": 106}, None, png, *command)
    draws("linattn-sd35 -i", {}, None, png, *command, "-i", data / "deit-tiny" / "picture.png")

    transformer, vae = (f"{f}/diffusion_pytorch_model.safetensors" for f in ("transformer", "vae"))
    clip_l, clip_g, t5 = (f"{f}/model.safetensors" for f in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    attn = "transformer_blocks.0.attn."
    for file, added, words in [
        (transformer, {attn + "to_q.lora_A.weight": [4, 64], attn + "to_q.lora_B.weight": [64, 4]},
         ["SD3.5 transformer", f"'{attn}to_q.lora_A.weight' and 1 more"]),
        (transformer, {"transformer_blocks.3.attn2.to_q.weight": [64, 64]}, ["'transformer_blocks.3.attn2.to_q.weight' is"]),
        (vae, {"decoder.up_blocks.0.attentions.0.to_q.weight": [24, 24]}, ["VAE", "'decoder.up_blocks.0.attentions"]),
        (clip_l, {"text_model.encoder.layers.0.self_attn.q_proj.lora_down.weight": [4, 32]}, ["CLIP-L", "lora_down"]),
        (clip_g, {"text_projection.bias": [24]}, ["CLIP-G", "'text_projection.bias'"]),
        (t5, {"encoder.block.1.layer.0.SelfAttention.q.bias": [64]}, ["T5", "'encoder.block.1.layer.0.SelfAttention.q.bias'"]),
        (t5, {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": [32, 4]}, ["T5", "block.1"]),
    ]:
        with_tensors(original / file, tiny / file, added)
        refuses("linattn-sd35", words, png, *command)
        if file == transformer:
            refuses("linattn-demo", words, scratch / "demo" / "softmax.png", demo, tiny, original, "--size", 64, "--steps", 1,
                    "-t", 1, "--out", scratch / "demo")
        shutil.copy(original / file, tiny / file)

    # what published files hold beside
    with_tensors(original / clip_l, tiny / clip_l, {"text_model.embeddings.position_ids": [1, 77], "logit_scale": [],
                                                    "vision_model.embeddings.class_embedding": [8]})
    with_tensors(original / t5, tiny / t5, {"encoder.embed_tokens.weight": [8, 64], "decoder.block.0.layer.0.x": [4],
                                            "lm_head.weight": [4], "scaled_fp8": [0],
                                            "encoder.block.0.layer.0.SelfAttention.q.scale_input": []})
    with_tensors(original / vae, tiny / vae, {"quant_conv.bias": [32], "loss.logvar": []})
    draws("what published files hold", {"text_model.embeddings.position_ids": 1, "logit_scale": 1, "vision_model.*": 1,
                                        "encoder.embed_tokens.weight": 1, "decoder.*": 1, "*.scale_input": 1,
                                        "scaled_fp8": 1, "quant_conv.*": 1, "loss.*": 1},
          reference, png, *command)
    shutil.copytree(original, tiny, dirs_exist_ok=True)

    # a file of several components, whose others are no business of the transformer
    single = scratch / "single.safetensors"
    prefix = "model.diffusion_model."
    beside = {"model_sampling.sigmas": [10], "text_encoders.clip_l.logit_scale": [], "first_stage_model.loss.logvar": [],
              "text_encoders.t5xxl.transformer.encoder.block.9.x": [2]}
    whole = [*command, "--diffusion-model", single]
    with_tensors(original / transformer, single, beside, prefix)
    draws("linattn-sd35, one file", {"model_sampling.*": 1}, reference, png, *whole)
    with_tensors(original / transformer, single, {**beside, prefix + "transformer_blocks.1.attn.to_k.lora_A.weight": [4, 64]},
                 prefix)
    refuses("linattn-sd35, one file", ["transformer_blocks.1.attn.to_k.lora_A.weight"], png, *whole)
    with_tensors(original / transformer, single, {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": [4, 64]}, prefix)
    refuses("linattn-sd35, a LoRA beside the model", ["lora_unet_joint_blocks_0"], png, *whole)


def test_dit(scratch: pathlib.Path) -> None:
    model, png, original = scratch / "dit.safetensors", scratch / "dit.png", data / "dit-tiny"
    command = [dit, "-m", model, "--heads", 3, "--vae", original / "vae", "--classes", 1, "--sampler", "ddim", "--steps", 2,
               "-t", 1, "-o", png]
    norms = {f"blocks.{i}.attn.{x}_norm.weight": [16] for i in range(3) for x in "qk"}
    with_tensors(original / "model.safetensors", model, {})
    reference = draws("linattn-dit", {}, None, png, *command)
    with_tensors(original / "model.safetensors", model, norms)
    refuses("linattn-dit", ["'blocks.0.attn.q_norm.weight' and 5 more"], png, *command)
    with_tensors(original / "model.safetensors", model, {"ema.blocks.0.attn.q_norm.bias": [16], "opt.state": [3]}, "ema.")
    refuses("linattn-dit, EMA", ["'ema.blocks.0.attn.q_norm.bias' is"], png, *command)
    with_tensors(original / "model.safetensors", model, {"opt.state": [3]}, "ema.")
    draws("linattn-dit, a training checkpoint", {}, reference, png, *command)
    vae = scratch / "vae"
    shutil.copytree(original / "vae", vae)
    file = "diffusion_pytorch_model.safetensors"
    with_tensors(original / "model.safetensors", model, {})
    with_tensors(original / "vae" / file, vae / file, {"decoder.mid_block.attentions.0.to_q.lora_A.weight": [2, 16]})
    command[command.index(original / "vae")] = vae
    refuses("linattn-dit --vae", ["VAE", "lora_A"], png, *command)


def test_deit(scratch: pathlib.Path) -> None:
    model, original = scratch / "deit.safetensors", data / "deit-tiny"
    picture, png, t5 = original / "picture.jpg", scratch / "map.png", scratch / "deit_t5.safetensors"
    run(inherit, "--heads", 3, "--drop-cls", original / "model.safetensors", t5)
    with_tensors(original / "model.safetensors", model, {"blocks.0.ls1.gamma": [48], "blocks.1.ls1.gamma": [48]})
    words = ["'blocks.0.ls1.gamma' and 1 more"]
    refuses("linattn-deit", words, None, deit, model, "--heads", 3, picture)
    shutil.copytree(original, scratch / "deit")
    shutil.copy(model, scratch / "deit" / "model.safetensors")
    refuses("linattn-attention-map", words, png, attention_map, scratch / "deit", t5, "--picture", picture, "-o", png)
    with_tensors(original / "model.safetensors", model, {"mask_token": [1, 1, 48], "ema.x": [2]})
    refuses("linattn-deit", ["'ema.x' is"], None, deit, model, "--heads", 3, picture)
    with_tensors(original / "model.safetensors", model, {"mask_token": [1, 1, 48]})
    facts = json.loads(run(deit, model, "--heads", 3, picture, "--json").stdout)
    check("linattn-deit lists the mask", [(line["names"], line["count"]) for line in facts["ignored_tensors"]] == [("mask_token", 1)])


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        for test in (test_sd35, test_dit, test_deit):
            test(pathlib.Path(name))
    if failures:
        print(f"{len(failures)} of the checks failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
