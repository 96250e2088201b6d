#!/usr/bin/env python3
"""Write the tiny DiT of the tests, its VAE and its reference samples.

The model has the shape of DiT (a class table with a row for no class, adaLN-Zero, learned variance) at a
size of 0.3 MB, with random weights; the VAE is one of Stable Diffusion 1 with names as diffusers wrote
them before 2023, which is how sd-vae-ft-mse has them. Samples are computed in float64: the blocks are
those of diffusers' DiTTransformer2DModel, with softmax attention and with DiT5's mixed attention, which
is defined here on its own, by automatic differentiation of its inner loss; the samplers are written out
below from their papers, and held to diffusers' schedulers.

    python3 -m venv /tmp/dit && /tmp/dit/bin/pip install torch==2.13.0 diffusers==0.35.2 pillow
    /tmp/dit/bin/python tests/reference/dit_tiny.py

Output, below --output (default tests/data/dit-tiny):
  model.safetensors   the DiT, official names, float16 (positions float32)
  dit5.safetensors    what its conversion to DiT5 adds
  vae/                the decoder
  samples.safetensors final latents of every run, the network's output at one time, decoded pixels
  *.png               the first sample of every run
"""

import argparse
import json
import math
import pathlib

import diffusers
import numpy
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

SEED = 5
CLASSES, DEPTH, HEADS, HEAD_DIM, PATCH, CHANNELS, GRID = 10, 3, 3, 16, 2, 4, 8
WIDTH = HEADS * HEAD_DIM
VAE_CHANNELS = (8, 8, 16, 16)
VAE_SCALE = 0.18215
WINDOW = 5

LABELS, GUIDANCE, NOISE_SEED = (1, 7, 3, 9), 4.0, 0
# name: attention, sampler, steps, height and width of the latents
RUNS = {
    "softmax-ddpm": ("softmax", "ddpm", 20, 16, 16),
    "softmax-ddim": ("softmax", "ddim", 10, 16, 12),
    "dit5-ddpm": ("dit5", "ddpm", 20, 16, 16),
    "dit5-ddim": ("dit5", "ddim", 10, 16, 12),
}


class Draw:
    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, gain=1.0):
        return gain * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def linear(self, tensors, name, outputs, inputs, gain=1.0, bias=0.1):
        tensors[name + ".weight"] = self(outputs, inputs, gain=gain / math.sqrt(inputs))
        tensors[name + ".bias"] = self(outputs, gain=bias)


def sincos(rows, columns):
    """Position embeddings [rows * columns, WIDTH]: column, then row, each sines, then cosines."""
    quarter = WIDTH // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    parts = [f(p.reshape(-1, 1) * omega) for p in (x, y) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1)


def draw_model():
    """The output layer holds a part of the inverse of the patch embedding, so that the sampler takes noise
    off as it does with a trained model."""
    draw = Draw(SEED)
    t = {"pos_embed": sincos(GRID, GRID)[None]}
    patch = CHANNELS * PATCH * PATCH
    embed = torch.linalg.qr(draw(WIDTH, patch))[0]  # columns: channel, row, column
    t["x_embedder.proj.weight"] = 2 * embed.reshape(WIDTH, CHANNELS, PATCH, PATCH)
    t["x_embedder.proj.bias"] = draw(WIDTH, gain=0.1)
    draw.linear(t, "t_embedder.mlp.0", WIDTH, 256, gain=2.0)
    draw.linear(t, "t_embedder.mlp.2", WIDTH, WIDTH, gain=2.0)
    t["y_embedder.embedding_table.weight"] = draw(CLASSES + 1, WIDTH, gain=0.3)
    for i in range(DEPTH):
        block = f"blocks.{i}."
        draw.linear(t, block + "attn.qkv", 3 * WIDTH, WIDTH, gain=1.6)
        draw.linear(t, block + "attn.proj", WIDTH, WIDTH, gain=1.5)
        draw.linear(t, block + "mlp.fc1", 4 * WIDTH, WIDTH)
        draw.linear(t, block + "mlp.fc2", WIDTH, 4 * WIDTH)
        draw.linear(t, block + "adaLN_modulation.1", 6 * WIDTH, WIDTH, gain=0.2, bias=0.3)
    draw.linear(t, "final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH, gain=0.1)
    inverse = embed.T.reshape(CHANNELS, PATCH * PATCH, WIDTH).transpose(0, 1)  # [row column, channel, width]
    noise = 2.0 * inverse + draw(PATCH * PATCH, CHANNELS, WIDTH, gain=0.1 / math.sqrt(WIDTH))
    variance = draw(PATCH * PATCH, CHANNELS, WIDTH, gain=0.5 / math.sqrt(WIDTH))
    t["final_layer.linear.weight"] = torch.cat([noise, variance], dim=1).reshape(-1, WIDTH)
    t["final_layer.linear.bias"] = draw(2 * patch, gain=0.05)
    stored = {name: torch.float32 if name == "pos_embed" else torch.float16 for name in t}
    return {name: value.to(stored[name]).contiguous() for name, value in t.items()}


def draw_conversion():
    """Fast weights as large as trained ones, so that the inner update matters."""
    draw = Draw(SEED + 1)
    t = {}
    for i in range(DEPTH):
        stem = f"blocks.{i}.attn."
        for name in ("w1", "w2"):
            t[stem + name] = draw(1, HEADS, HEAD_DIM, HEAD_DIM, gain=1 / math.sqrt(HEAD_DIM))
        for name in ("q_conv2d", "k_conv2d"):
            t[stem + name + ".weight"] = draw(WIDTH, 1, 3, 3, gain=0.2)
            t[stem + name + ".bias"] = draw(WIDTH, gain=0.2)
        t[stem + "qk_scale_ttt"] = 1 + draw(1, 1, WIDTH, 2, gain=0.2)
        t[stem + "qk_offset_ttt"] = draw(1, 1, WIDTH, 2, gain=0.2)
    return {name: v.to(torch.float16) for name, v in t.items()}


class MixedAttention:
    """DiT5's attention as an attention processor of diffusers: half a two-layer model that is trained on the
    keys and values of the sample by one gradient step, half softmax over the window around each token."""

    def __init__(self, tensors, stem, rows, columns):
        self.p = {n.removeprefix(stem): v.double() for n, v in tensors.items() if n.startswith(stem)}
        self.rows, self.columns = rows, columns

    def heads(self, x):
        return x.reshape(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2)

    def add_conv(self, x, name):
        grid = x.transpose(1, 2).reshape(-1, WIDTH, self.rows, self.columns)
        weight, bias = self.p[name + ".weight"], self.p[name + ".bias"]
        return x + F.conv2d(grid, weight, bias, padding=1, groups=WIDTH).flatten(2).transpose(1, 2)

    def trained(self, q, k, v):
        scale, offset = self.p["qk_scale_ttt"][0, 0], self.p["qk_offset_ttt"][0, 0]
        q, k = q * scale[:, 0] + offset[:, 0], k * scale[:, 1] + offset[:, 1]
        k = (k - k.mean(dim=1, keepdim=True)) / (k.var(dim=1, keepdim=True, correction=0) + 1).sqrt()
        q, k, v = self.heads(self.add_conv(q, "q_conv2d")), self.heads(self.add_conv(k, "k_conv2d")), self.heads(v)
        with torch.enable_grad():
            w1, w2 = (
                self.p[name].expand(q.shape[0], -1, -1, -1).clone().requires_grad_() for name in ("w1", "w2")
            )
            residual = F.silu(k @ w1) @ w2 - v
            loss = (residual**2).sum() * HEAD_DIM**-0.5 / (2 * k.shape[2])
            g1, g2 = torch.autograd.grad(loss, (w1, w2))
        return F.silu(q @ (w1 - g1).detach()) @ (w2 - g2).detach()

    def local(self, q, k, v):
        q, k, v = self.heads(q), self.heads(k), self.heads(v)

        def inside(extent):  # [query, key]: the window keeps its size at the border
            start = (torch.arange(extent) - WINDOW // 2).clamp(0, extent - WINDOW)[:, None]
            key = torch.arange(extent)[None]
            return (key >= start) & (key < start + WINDOW)

        y, x = inside(self.rows), inside(self.columns)
        mask = (y[:, None, :, None] & x[None, :, None, :]).reshape(q.shape[2], q.shape[2])
        logits = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(~mask, -math.inf)
        return logits.softmax(dim=-1) @ v

    def __call__(self, attn, hidden_states, **_):
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        core = 0.5 * (self.local(q, k, v) + self.trained(q, k, v))
        return attn.to_out[0](core.transpose(1, 2).flatten(2))


class Sinusoid(torch.nn.Module):
    """In double, and with the frequencies of the official code, which diffusers has spaced otherwise."""

    def forward(self, t):
        angle = t.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class Dit:
    """diffusers' blocks with the weights of the model, on any grid."""

    def __init__(self, tensors, conversion=None):
        self.model = diffusers.DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS,
            num_layers=DEPTH,
            sample_size=GRID * PATCH,
            patch_size=PATCH,
            num_embeds_ada_norm=CLASSES,
            norm_eps=1e-6,
        ).double()
        self.conversion = conversion
        t = {name: value.double() for name, value in tensors.items()}
        self.patch = (t["x_embedder.proj.weight"], t["x_embedder.proj.bias"])
        state = {}

        def linear(target, source, rows=slice(None)):
            for part in (".weight", ".bias"):
                state[target + part] = t[source + part][rows]

        for i in range(DEPTH):
            ours, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
            for j, name in enumerate(("to_q", "to_k", "to_v")):
                linear(theirs + "attn1." + name, ours + "attn.qkv", slice(j * WIDTH, (j + 1) * WIDTH))
            linear(theirs + "attn1.to_out.0", ours + "attn.proj")
            linear(theirs + "ff.net.0.proj", ours + "mlp.fc1")
            linear(theirs + "ff.net.2", ours + "mlp.fc2")
            linear(theirs + "norm1.linear", ours + "adaLN_modulation.1")
            linear(theirs + "norm1.emb.timestep_embedder.linear_1", "t_embedder.mlp.0")
            linear(theirs + "norm1.emb.timestep_embedder.linear_2", "t_embedder.mlp.2")
            table = "embedding_table.weight"
            state[theirs + "norm1.emb.class_embedder." + table] = t["y_embedder." + table]
        linear("proj_out_1", "final_layer.adaLN_modulation.1")
        linear("proj_out_2", "final_layer.linear")
        linear("pos_embed.proj", "x_embedder.proj")
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected and all(name.startswith("pos_embed") for name in missing), (missing, unexpected)
        self.model.pos_embed.pos_embed = t["pos_embed"]
        for block in self.model.transformer_blocks:
            block.norm1.emb.time_proj = Sinusoid()
        self.model.eval()
        self.positions = t["pos_embed"]

    @torch.no_grad()
    def __call__(self, x, t, y):
        rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        square = rows == columns == GRID
        tokens = F.conv2d(x, *self.patch, stride=PATCH).flatten(2).transpose(1, 2)
        tokens = tokens + (self.positions if square else sincos(rows, columns))
        for i, block in enumerate(self.model.transformer_blocks):
            if self.conversion is not None:
                block.attn1.processor = MixedAttention(self.conversion, f"blocks.{i}.attn.", rows, columns)
            tokens = block(tokens, timestep=t, class_labels=y)
        c = self.model.transformer_blocks[0].norm1.emb(t, y, hidden_dtype=tokens.dtype)
        shift, scale = self.model.proj_out_1(F.silu(c)).chunk(2, dim=1)
        tokens = self.model.proj_out_2(self.model.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None])
        patches = tokens.reshape(-1, rows, columns, PATCH, PATCH, 2 * CHANNELS)
        out = patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, 2 * CHANNELS, *x.shape[2:])
        if square:
            assert (out - self.model(x, timestep=t, class_labels=y).sample).abs().max() < 1e-12
        return out


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------


def kept():
    """prod (1 - beta) at every time of the training."""
    return numpy.cumprod(1 - numpy.linspace(1e-4, 0.02, 1000))


def times_of(sampler, steps):
    if sampler == "ddpm":
        return [round(i * 999 / (steps - 1)) for i in range(steps)]
    return list(range(0, 1000, 1000 // steps))


def walk(sampler, times, predict, x, fresh):
    """x at the first time of the walk down, `predict` gives noise and variance, `fresh` a step's numbers."""
    a = kept()[times]
    before = numpy.concatenate([[1.0], a[:-1]])
    for i in reversed(range(len(times))):
        noise, v = predict(x, times[i])
        x0 = (x - math.sqrt(1 - a[i]) * noise) / math.sqrt(a[i])
        if sampler == "ddim":
            x = math.sqrt(before[i]) * x0 + math.sqrt(1 - before[i]) * noise
            continue
        beta = 1 - a[i] / before[i]
        x = (
            math.sqrt(before[i]) * beta * x0 + math.sqrt(a[i] / before[i]) * (1 - before[i]) * x
        ) / (1 - a[i])
        if i > 0:
            posterior = beta * (1 - before[i]) / (1 - a[i])
            log = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(posterior)
            x = x + (log / 2).exp() * fresh(i)
    return x


def walk_of_diffusers(sampler, times, predict, x, fresh):
    common = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
    if sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(**common)
    else:
        scheduler = diffusers.DDPMScheduler(
            **common, variance_type="learned_range", timestep_spacing="linspace"
        )
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # theirs are float32
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    scheduler.final_alpha_cumprod = scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(len(times))
    assert scheduler.timesteps.tolist() == times[::-1], (scheduler.timesteps, times)
    for i, t in zip(reversed(range(len(times))), scheduler.timesteps):
        noise, v = predict(x, int(t))
        if sampler == "ddim":
            x = scheduler.step(noise, t, x).prev_sample
        else:
            diffusers.schedulers.scheduling_ddpm.randn_tensor = lambda *_, i=i, **__: fresh(i)
            x = scheduler.step(torch.cat([noise, v], dim=1), t, x).prev_sample
    return x


def sample(model, sampler, steps, height, width):
    n = len(LABELS)
    labels = torch.tensor(LABELS + (CLASSES,) * n)
    times = times_of(sampler, steps)

    def predict(x, t):
        out = model(torch.cat([x, x]), torch.full((2 * n,), t), labels)
        noise, v = out[:n].chunk(2, dim=1)
        guided = out[n:, :3] + GUIDANCE * (noise[:, :3] - out[n:, :3])
        return torch.cat([guided, noise[:, 3:]], dim=1), v

    def run(walker):
        generator = torch.Generator().manual_seed(NOISE_SEED)
        x = torch.randn(n, CHANNELS, height, width, generator=generator).double()
        whole = (2 * n, CHANNELS, height, width)
        return walker(
            sampler, times, predict, x, lambda i: torch.randn(whole, generator=generator)[:n].double()
        )

    x, theirs = run(walk), run(walk_of_diffusers)
    print(f"  |ours - diffusers' scheduler| / |ours| = {float((x - theirs).norm() / x.norm()):.1e}")
    return x


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def draw_vae():
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(VAE_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(VAE_CHANNELS),
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
    ).double()
    draw = Draw(SEED + 2)
    smooth = torch.tensor([0.5, 1.0, 0.5], dtype=torch.float64)
    for name, p in vae.named_parameters():
        if p.ndim == 1:
            norm = "norm" in name and name.endswith("weight")
            p.data = 1 + draw(*p.shape, gain=0.1) if norm else draw(*p.shape, gain=0.1)
        else:
            p.data = draw(*p.shape, gain=1 / math.sqrt(p[0].numel()))
            if p.shape[2:] == (3, 3):
                p.data *= 1.33 * torch.outer(smooth, smooth)
    return vae


def balance_colours(vae, latents):
    """Scale the last convolution so that few values of these samples lie outside [-1, 1]."""
    with torch.no_grad():
        deviation, mean = torch.std_mean(vae.decode(latents / VAE_SCALE).sample, dim=(0, 2, 3))
    last = vae.decoder.conv_out
    last.weight.data *= (0.42 / deviation)[:, None, None, None]
    last.bias.data = (last.bias.data - mean) * 0.42 / deviation


def write_vae(vae, folder):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in vae.state_dict().items():
        if not name.startswith(("decoder.", "post_quant_conv.")):
            continue
        for new, old in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        tensors[name] = value.to(torch.float16).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": VAE_CHANNELS,
        "latent_channels": CHANNELS,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(torch.float16).double()


def picture(pixels):
    values = ((pixels.clamp(-1, 1) + 1) / 2 * 255 + 0.5).floor().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def main():
    default = pathlib.Path(__file__).resolve().parent.parent / "data" / "dit-tiny"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=default, help="default: tests/data/dit-tiny")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # sums in one order

    tensors, conversion = draw_model(), draw_conversion()
    safetensors.torch.save_file(tensors, output / "model.safetensors")
    safetensors.torch.save_file(conversion, output / "dit5.safetensors")
    models = {"softmax": Dit(tensors), "dit5": Dit(tensors, conversion)}

    recorded = {}
    for name, (attention, sampler, steps, height, width) in RUNS.items():
        print(name)
        recorded[name + ".latents"] = sample(models[attention], sampler, steps, height, width)
    vae = draw_vae()
    balance_colours(vae, recorded["softmax-ddpm.latents"])
    write_vae(vae, output / "vae")
    for name in RUNS:
        latents = recorded[name + ".latents"]
        with torch.no_grad():
            pixels = vae.decode(latents / VAE_SCALE).sample
        print(name, "latents", float(latents.std()), "pixels", float(pixels.std()))
        picture(pixels[0]).save(output / (name + ".png"), optimize=True)
    x = Draw(SEED + 3)(2, CHANNELS, 12, 20).float().double()
    for attention, model in models.items():
        recorded[attention + ".output"] = model(x, torch.tensor([999, 130]), torch.tensor([4, CLASSES]))
    recorded["x"] = x
    with torch.no_grad():
        recorded["pixels"] = vae.decode(recorded["softmax-ddim.latents"][:1] / VAE_SCALE).sample[:, :, ::4, ::4]
    recorded = {name: value.to(torch.float32).contiguous() for name, value in recorded.items()}
    safetensors.torch.save_file(recorded, output / "samples.safetensors")
    sizes = {path.name: path.stat().st_size for path in sorted(output.rglob("*")) if path.is_file()}
    print(sizes, sum(sizes.values()))


if __name__ == "__main__":
    main()
