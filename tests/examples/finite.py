#!/usr/bin/env python3
"""A value that is not finite ends every command: exit code 2, one sentence that names the stage and the block where it
came up and the weight that is to blame, and no output. Weights of the tiny models are poisoned one at a time."""

import contextlib
import json
import pathlib
import shutil
import struct
import sys
import tempfile

from commands import check, failures, run

inherit, sd35, demo, deit, dit, attention_map = (pathlib.Path(p) for p in sys.argv[2:8])
data = pathlib.Path(sys.argv[1])

BITS = {  # Inf, -Inf and NaN of each type, little endian
    "F16": (b"\x00\x7c", b"\x00\xfc", b"\x01\x7e"),
    "BF16": (b"\x80\x7f", b"\x80\xff", b"\xc1\x7f"),
    "F32": (b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\x01\x00\xc0\x7f"),
    "F8_E4M3": (b"\x7f", b"\xff", b"\x7f"),  # NaN alone
}
INF, MINUS_INF, NAN = range(3)


def header(path: pathlib.Path) -> tuple[dict, int]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size)), 8 + size


@contextlib.contextmanager
def poisoned(path: pathlib.Path, tensor: str, kind: int = INF, element: int = 0):
    """One element of one tensor is Inf or NaN, for as long as this lasts."""
    tensors, start = header(path)
    bits = BITS[tensors[tensor]["dtype"]][kind]
    begin, end = tensors[tensor]["data_offsets"]
    at = start + begin + element % ((end - begin) // len(bits)) * len(bits)
    with path.open("r+b") as file:
        file.seek(at)
        before = file.read(len(bits))
        file.seek(at)
        file.write(bits)
    try:
        yield
    finally:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(before)


def converted(path: pathlib.Path, dtype: str, only: str = "") -> None:
    """A file of F16 in another type: the upper half of F32, or F8 for the tensors whose name has `only` in it."""
    tensors, start = header(path)
    content = path.read_bytes()[start:]
    result, body = {}, b""
    for name, tensor in tensors.items():
        if name == "__metadata__":
            continue
        begin, end = tensor["data_offsets"]
        values = content[begin:end]
        if only in name:
            halves = struct.unpack(f"<{len(values) // 2}e", values)
            if dtype == "BF16":
                values = b"".join(struct.pack("<f", h)[2:] for h in halves)
            elif dtype == "F8_E4M3":
                values = bytes(0x30 if h >= 0 else 0xB0 for h in halves)  # 0.5 and -0.5
            tensor = {**tensor, "dtype": dtype}
        result[name] = {**tensor, "data_offsets": [len(body), len(body) + len(values)]}
        body += values + bytes(-len(values) % 8)
    text = json.dumps(result).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def refuses(what: str, words: list[str], output: pathlib.Path | None, *command) -> None:
    result = run(*command)
    lines = [line for line in result.stderr.splitlines() if "not finite" in line]
    ok = result.returncode == 2 and len(lines) == 1 and all(word in lines[0] for word in words)
    if output is not None:
        left = [str(path) for path in output.parent.iterdir()]
        ok = ok and not left and "nan" not in result.stdout.lower() and "null" not in result.stdout
    else:
        ok = ok and "nan" not in result.stdout.lower() and "null" not in result.stdout
    check(f"{what}: {lines[0] if lines else ''}", ok, f"exit code {result.returncode}, wanted {words}\n{result.stderr}")
    if output is not None:
        for path in output.parent.iterdir():
            path.unlink()


def test_sd35(scratch: pathlib.Path, out: pathlib.Path) -> None:
    tiny = scratch / "sd35"
    shutil.copytree(data / "sd35-tiny", tiny)
    png = out / "picture.png"
    command = [sd35, "-m", tiny, "-W", 64, "-H", 64, "--steps", 2, "-t", 1, "-p", "a red fox", "-o", png, "--json"]
    transformer, vae = (tiny / f / "diffusion_pytorch_model.safetensors" for f in ("transformer", "vae"))
    clip_l, clip_g, t5 = (tiny / f / "model.safetensors" for f in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    layer = "text_model.encoder.layers.{}."
    cases = [
        (clip_l, layer.format(0) + "self_attn.q_proj.weight", INF, ["CLIP-L text encoder, block 0"]),
        (clip_l, layer.format(1) + "mlp.fc2.bias", NAN, ["CLIP-L text encoder, block 1"]),
        (clip_l, "text_model.embeddings.position_embedding.weight", MINUS_INF, ["CLIP-L text encoder, embedding"]),
        (clip_g, layer.format(2) + "layer_norm2.weight", INF, ["CLIP-G text encoder, block 2"]),
        (clip_g, "text_projection.weight", INF, ["CLIP-G text encoder, text projection"]),
        (clip_g, "text_model.final_layer_norm.bias", NAN, ["CLIP-G text encoder, final norm"]),
        (t5, "encoder.block.1.layer.1.DenseReluDense.wo.weight", INF, ["T5 text encoder, block 1"]),
        (t5, "encoder.block.0.layer.0.layer_norm.weight", NAN, ["T5 text encoder, block 0"]),
        (t5, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", MINUS_INF,
         ["T5 text encoder, relative attention bias"]),
        (transformer, "pos_embed.proj.weight", INF, ["transformer, patches (step 1)"]),
        (transformer, "time_text_embed.timestep_embedder.linear_2.weight", NAN, ["transformer, time embedding"]),
        (transformer, "time_text_embed.text_embedder.linear_1.bias", INF, ["transformer, pooled text embedding"]),
        (transformer, "context_embedder.weight", INF, ["transformer, context embedder"]),
        (transformer, "transformer_blocks.1.norm1.linear.weight", INF, ["transformer, block 1, modulation"]),
        (transformer, "transformer_blocks.0.attn.to_q.weight", NAN, ["transformer, block 0", "(step 1)"]),
        (transformer, "transformer_blocks.1.attn2.to_v.bias", INF, ["transformer, block 1 (step 1)"]),
        (transformer, "transformer_blocks.2.ff_context.net.2.weight", INF, ["transformer, block 2, text (step 1)"]),
        (transformer, "transformer_blocks.3.ff.net.0.proj.bias", NAN, ["transformer, block 3 (step 1)"]),
        (transformer, "proj_out.weight", INF, ["transformer, final layer (step 1)"]),
        (vae, "decoder.conv_in.weight", INF, ["VAE decoder, conv_in"]),
        (vae, "decoder.mid_block.attentions.0.to_v.weight", INF, ["VAE decoder, middle attention"]),
        (vae, "decoder.up_blocks.2.resnets.1.conv1.weight", NAN, ["VAE decoder, up block 1, residual block 1"]),
        (vae, "decoder.up_blocks.0.upsamplers.0.conv.bias", INF, ["VAE decoder, up block 3, upsampling"]),
        (vae, "decoder.conv_norm_out.weight", INF, ["VAE decoder, conv_out"]),
    ]
    for file, tensor, kind, words in cases:
        with poisoned(file, tensor, kind):
            refuses("linattn-sd35", [*words, f"'{tensor}'"], png, *command)
    image = ["-i", data / "deit-tiny" / "picture.png"]
    with poisoned(vae, "encoder.down_blocks.1.resnets.0.conv2.weight", INF):
        refuses("linattn-sd35 -i", ["VAE encoder, down block 1, residual block 0", "encoder.down"], png, *command, *image)
        result = run(*command)
        check("what a run does not use may be infinite", result.returncode == 0 and png.exists(), result.stderr)
        png.unlink()
    result = run(*command, "--cfg-scale", 1e38)
    check("linattn-sd35 --cfg-scale 1e38 draws nothing", result.returncode == 2 and not png.exists(), result.stderr)
    with poisoned(transformer, "transformer_blocks.1.attn.to_k.bias", INF):
        refuses("linattn-sd35, four pictures", ["transformer, block 1"], png, *command, "-b", 4)
        refuses("linattn-demo", ["transformer, block 1", str(tiny)], png,
                demo, data / "sd35-tiny", tiny, "--size", 64, "--steps", 1, "-t", 1, "--out", out)

    # other types
    converted(transformer, "BF16")
    with poisoned(transformer, "transformer_blocks.2.attn.to_out.0.weight", INF):
        refuses("linattn-sd35, BF16", ["transformer, block 2 (step 1)"], png, *command)
    converted(t5, "F8_E4M3", "SelfAttention.v.weight")
    result = run(*command)
    check("the types themselves are taken", result.returncode == 0 and png.exists(), result.stderr)
    png.unlink()
    with poisoned(t5, "encoder.block.1.layer.0.SelfAttention.v.weight", NAN):
        refuses("linattn-sd35, F8_E4M3", ["T5 text encoder, block 1", "holds NaN"], png, *command)


def test_deit(scratch: pathlib.Path, out: pathlib.Path) -> None:
    tiny = scratch / "deit"
    shutil.copytree(data / "deit-tiny", tiny)
    model, t5 = tiny / "model.safetensors", scratch / "t5.safetensors"
    run(inherit, "--heads", 3, "--drop-cls", model, t5)
    picture, png = data / "deit-tiny" / "picture.jpg", out / "map.png"
    for tensor, kind, place in [
        ("patch_embed.proj.weight", INF, "embedding"),
        ("blocks.0.attn.qkv.weight", INF, "block 0"),
        ("blocks.1.attn.qkv.bias", NAN, "block 1"),
        ("blocks.1.mlp.fc1.weight", MINUS_INF, "block 1"),
        ("norm.bias", INF, "final norm"),
        ("head.bias", NAN, "head"),
    ]:
        with poisoned(model, tensor, kind):
            refuses("linattn-deit", [f"{tiny}, {place}:", f"'{tensor}'"], None, deit, tiny, picture, "--json")
    with poisoned(t5, "blocks.1.attn.w1", INF):
        refuses("linattn-deit, T5", ["block 1", "'blocks.1.attn.w1'"], None, deit, tiny, t5, picture)
        refuses("linattn-deit --size", ["block 1"], None, deit, t5, "--heads", 3, "--size", 32, "--json")
        refuses("linattn-attention-map", ["block 1", "'blocks.1.attn.w1'"], png, attention_map, tiny, t5, "--picture",
                picture, "--block", 1, "-o", png, "--json")
    with poisoned(model, "blocks.0.attn.qkv.weight", NAN, 48 * 48):  # a key's
        refuses("linattn-attention-map", ["block 0"], png, attention_map, tiny, t5, "--picture", picture, "-o", png)
    config = json.loads((tiny / "config.json").read_text())
    config["pretrained_cfg"]["std"] = [1e-300] * 3
    (tiny / "config.json").write_text(json.dumps(config))
    refuses("linattn-deit, std", ["the picture given"], None, deit, tiny, picture)

    # q, k and v in a file
    layer = scratch / "layer.safetensors"
    tensors, content = header(t5)[0], t5.read_bytes()[header(t5)[1] :]
    result, body = {"__metadata__": tensors["__metadata__"]}, b""
    for name, tensor in tensors.items():
        if name.startswith("blocks.0.attn.") and not ("qkv" in name or "proj" in name):
            begin, end = tensor["data_offsets"]
            result[name] = {**tensor, "data_offsets": [len(body), len(body) + end - begin]}
            body += content[begin:end]
    for index, name in enumerate("qkv"):
        values = struct.pack("<768f", *((i * 7 + index) % 13 - 6 for i in range(768)))
        result[name] = {"dtype": "F32", "shape": [16, 3, 16], "data_offsets": [len(body), len(body) + len(values)]}
        body += values
    result["__metadata__"] = {key: value for key, value in result["__metadata__"].items() if "blocks.1" not in key}
    text = json.dumps(result).encode()
    layer.write_bytes(struct.pack("<Q", len(text)) + text + body)
    command = [attention_map, layer, "-o", png, "--json"]
    result = run(*command)
    check("linattn-attention-map draws the layer", result.returncode == 0 and png.exists(), result.stderr)
    png.unlink(missing_ok=True)
    with poisoned(layer, "k", NAN, 5):
        refuses("linattn-attention-map, k", ["tensor 'k'"], png, *command)
    with poisoned(layer, "blocks.0.attn.w1", INF):
        refuses("linattn-attention-map, w1", ["TTT map"], png, *command)


def test_dit(scratch: pathlib.Path, out: pathlib.Path) -> None:
    tiny, png = scratch / "dit", out / "samples.png"
    shutil.copytree(data / "dit-tiny", tiny)
    model, vae = tiny / "model.safetensors", tiny / "vae" / "diffusion_pytorch_model.safetensors"
    command = [dit, "-m", model, "--heads", 3, "--vae", tiny / "vae", "-c", "1,2", "--sampler", "ddim", "--steps", 2, "-t", 1,
               "-o", png, "--json"]
    for tensor, kind, place in [
        ("x_embedder.proj.bias", INF, "patches (step 1)"),
        ("t_embedder.mlp.2.weight", NAN, "time and class embedding (step 1)"),
        ("blocks.0.attn.qkv.weight", INF, "block 0 (step 1)"),
        ("blocks.1.mlp.fc2.weight", MINUS_INF, "block 1 (step 1)"),
        ("blocks.2.adaLN_modulation.1.bias", INF, "block 2, modulation (step 1)"),
        ("final_layer.linear.weight", NAN, "final layer (step 1)"),
    ]:
        with poisoned(model, tensor, kind):
            refuses("linattn-dit", [f"{model}, transformer, {place}:", f"'{tensor}'"], png, *command)
    with poisoned(vae, "decoder.up_blocks.1.resnets.0.conv1.weight", NAN):
        refuses("linattn-dit, VAE", ["VAE decoder, up block 2, residual block 0"], png, *command)
    result = run(*command, "--cfg-scale", 1e38)
    check("linattn-dit --cfg-scale 1e38 draws nothing", result.returncode == 2 and not png.exists(), result.stderr)

    # weights that a conversion takes from a file
    with poisoned(tiny / "dit5.safetensors", "blocks.0.attn.w1", INF):
        refuses("linattn-inherit --init", ["dit5.safetensors", "'blocks.0.attn.w1'"], png,
                inherit, "--heads", 3, model, png, "--init", tiny / "dit5.safetensors")


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        out = scratch / "out"
        out.mkdir()
        test_sd35(scratch, out)
        test_deit(scratch, out)
        test_dit(scratch, out)
    if failures:
        print(f"{len(failures)} of the checks failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
