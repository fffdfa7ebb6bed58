"""The shapes of jobs that others wrote, small: a table of LightningModules and their random batches."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jobs_layers as layers
import lightning as L
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

WIDTH, HEADS, LENGTH, WORDS = 32, 4, 12, 40


class Job(L.LightningModule):
    """A job that has never heard of this project: a subclass says its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.detach().clone())
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Block(nn.Module):
    """Norm, attention, norm, two maps. What else attention gets is passed on."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), attention, nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        x = x + self.attn(self.norm1(x), *args)
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """Two blocks behind an embedding of words, places and all."""

    def __init__(
        self, make: Callable[[], nn.Module], width: int = WIDTH, out: int = WORDS, depth: int = 2
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList([Block(width, make()) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, out)

    def forward(self, tokens: Tensor, *args: Any) -> Tensor:
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, *args)
        return self.head(self.norm(x))


class Words(Job):
    """The next word, or the word itself, by a stack of some attention."""

    def __init__(self, make: Callable[[], nn.Module], mask: Tensor | None = None) -> None:
        super().__init__()
        self.net, self.mask = Stack(make), mask

    def loss(self, batch: Tensor) -> Tensor:
        out = self.net(batch) if self.mask is None else self.net(batch, self.mask)
        return F.cross_entropy(out[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


class Forecast(Job):
    """An encoder of a series: ``attention(x, x, x)``, a convolution that halves the series, a second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 1)
        self.attention = nn.ModuleList([layers.ForecastAttention(WIDTH, HEADS) for _ in range(2)])
        self.norm = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.distil = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def loss(self, batch: Tensor) -> Tensor:
        x = self.embed(batch)
        for index, (attention, norm) in enumerate(zip(self.attention, self.norm, strict=True)):
            new, _ = attention(x, x, x, attn_mask=None)
            x = norm(x + new)
            if index == 0:
                x = F.max_pool1d(F.elu(self.distil(x.transpose(1, 2))), 2).transpose(1, 2)
        return (self.head(x.mean(1)).squeeze(-1) - batch[:, -1, 0]).square().mean()


class Conformer(Job):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 6)
        self.blocks = nn.ModuleList([Block(WIDTH, layers.RelativeAttention(WIDTH, HEADS)) for _ in range(2)])
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.register_buffer("places", torch.randn(1, 2 * LENGTH - 1, WIDTH))

    def loss(self, batch: Tensor) -> Tensor:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x, self.places)
            x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return F.cross_entropy(self.head(x).flatten(0, 1), (batch[..., 0] > 0).long().flatten())


class TorchBlock(nn.Module):
    """nn.MultiheadAttention, weights never asked for."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.self_attn(x, x, x, need_weights=False)[0])


class Siamese(Job):
    """One encoder that is run twice in a step, on inputs of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.encoder = nn.Sequential(*[TorchBlock(WIDTH, HEADS) for _ in range(2)])

    def loss(self, batch: Tensor) -> Tensor:
        left, right = (self.encoder(self.words(part)).mean(1) for part in (batch[:, :7], batch[:, 4:]))
        near = F.cosine_similarity(left, right).mean()
        far = F.cosine_similarity(left, right.roll(1, 0)).mean()
        return F.relu(1 + far - near)


class Adversaries(Job):
    """Two networks in turn, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(4, WIDTH),
            *[Block(WIDTH, layers.EinsumAttention(WIDTH, HEADS)) for _ in range(2)],
            nn.Linear(WIDTH, 3),
        )
        self.critic = nn.Sequential(
            nn.Linear(3, WIDTH), Block(WIDTH, layers.PatchMixer(WIDTH, HEADS)), nn.Linear(WIDTH, 1)
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        made = self.generator(torch.randn(len(batch), LENGTH, 4))
        self.toggle_optimizer(first)
        loss = F.softplus(-self.critic(made)).mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        other = F.softplus(-self.critic(batch)).mean() + F.softplus(self.critic(made.detach())).mean()
        second.zero_grad()
        self.manual_backward(other)
        second.step()
        self.untoggle_optimizer(second)
        self.losses += [loss.detach().clone(), other.detach().clone()]

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.generator, self.critic)]


class Pictures(nn.Module):
    """Patches behind a class token, of which the class token is what comes out."""

    def __init__(self, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.cls_token, self.pos_embed = (
            nn.Parameter(torch.randn(1, 1, width)),
            nn.Parameter(torch.randn(1, 5, width)),
        )
        self.blocks = nn.ModuleList([Block(width, layers.PatchMixer(width, heads)) for _ in range(2)])
        self.head = nn.Linear(width, out)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Towers(Job):
    """Two encoders of different widths and a contrastive loss."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = Pictures(24, 3, 16)
        self.text = Stack(lambda: layers.MaskedAttention(WIDTH, HEADS), out=16)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, tokens = batch
        seen = F.normalize(self.visual(images), dim=-1)
        read = F.normalize(self.text(tokens, layers.causal(tokens.shape[1]))[:, -1], dim=-1)
        logits, target = self.logit_scale.exp() * seen @ read.T, torch.arange(len(images))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Adapted(Words):
    """A frozen network with adapters of one's own."""

    def __init__(self) -> None:
        super().__init__(lambda: layers.AdaptedAttention(WIDTH, HEADS), layers.causal(LENGTH))

    def after_build(self) -> None:
        self.requires_grad_(False)
        for block in self.net.blocks:
            block.attn.adapt()


class DetectorEncoder(nn.Module):
    """Places are added to queries and keys, not to values."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        q = k = x + places
        return self.norm(x + self.self_attn(q, k, value=x)[0])


class DetectorDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, memory: Tensor, asked: Tensor, places: Tensor) -> Tensor:
        q = k = x + asked
        x = self.norm1(x + self.self_attn(q, k, value=x)[0])
        return self.norm2(x + self.multihead_attn(query=x + asked, key=memory + places, value=memory)[0])


class Detector(Job):
    """Encoder and decoder, with learnt queries."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, WIDTH, 2, 2)
        self.encoder = nn.ModuleList([DetectorEncoder() for _ in range(2)])
        self.decoder = nn.ModuleList([DetectorDecoder() for _ in range(2)])
        self.query_embed = nn.Embedding(6, WIDTH)
        self.place = nn.Parameter(torch.randn(16, WIDTH))
        self.boxes = nn.Linear(WIDTH, 4)

    def loss(self, batch: Tensor) -> Tensor:
        x = self.backbone(batch).flatten(2).transpose(1, 2)
        for layer in self.encoder:
            x = layer(x, self.place)
        asked = self.query_embed.weight.expand(len(batch), -1, -1)
        out = torch.zeros_like(asked)
        for layer in self.decoder:
            out = layer(out, x, asked, self.place)
        return (self.boxes(out).sigmoid() - batch.mean((1, 2, 3))[:, None, None]).abs().mean()


class Speech(Job):
    """Whisper, with generate in its validation."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.WhisperConfig(
            vocab_size=WORDS,
            num_mel_bins=8,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=WIDTH,
            decoder_ffn_dim=WIDTH,
            max_source_positions=10,
            max_target_positions=24,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            begin_suppress_tokens=None,
            suppress_tokens=None,
        )
        self.model = transformers.WhisperForConditionalGeneration._from_config(
            config, attn_implementation="sdpa"
        )
        self.said: list[Tensor] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.model(input_features=batch[0], labels=batch[1]).loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        said = self.model.generate(batch[0], max_new_tokens=4, do_sample=False)
        self.said.append(said)
        self.log("val/length", float(said.shape[1]))


class Annotated(Job):
    """Encoder and decoder of the annotated kind: masks with an axis for heads, cross-attention of one class."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.encoder, self.own, self.src = (
            nn.ModuleList([layers.MultiHeadedAttention(HEADS, WIDTH) for _ in range(2)]) for _ in range(3)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def loss(self, batch: Tensor) -> Tensor:
        source, target = batch[:, :7], batch[:, 7:]
        seen = (source != 0).unsqueeze(-2)
        memory = self.words(source)
        for layer in self.encoder:
            y = self.norm(memory)
            memory = memory + layer(y, y, y, seen)
        mask = layers.causal(target.shape[1])[None]
        x = self.words(target)
        for own, src in zip(self.own, self.src, strict=True):
            y = self.norm(x)
            x = x + own(y, y, y, mask)
            x = x + src(self.norm(x), memory, memory, seen)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), target[:, 1:].flatten())


class Windows(Job):
    """Windows of 4 × 4, the second layer's shifted by two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, WIDTH, 2, 2), nn.Linear(WIDTH, 5)
        self.attn = nn.ModuleList([layers.WindowedAttention(WIDTH, 4, HEADS) for _ in range(2)])
        self.norm = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        region = torch.zeros(1, 8, 8, 1)
        parts = (slice(0, -4), slice(-4, -2), slice(-2, None))
        for index, (rows, columns) in enumerate(itertools.product(parts, parts)):
            region[:, rows, columns] = index
        cut = self.cut(region).squeeze(-1)
        self.register_buffer("apart", (cut[:, None] != cut[:, :, None]).float() * -100.0)

    @staticmethod
    def cut(x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        return x.view(b, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)

    @staticmethod
    def join(x: Tensor) -> Tensor:
        return x.view(-1, 2, 2, 4, 4, x.shape[-1]).transpose(2, 3).reshape(-1, 8, 8, x.shape[-1])

    def loss(self, batch: Tensor) -> Tensor:
        x = self.embed(batch).permute(0, 2, 3, 1)
        for shift, attn, norm in zip((0, 2), self.attn, self.norm, strict=True):
            y = torch.roll(norm(x), (-shift, -shift), (1, 2))
            y = self.join(attn(self.cut(y), self.apart if shift else None))
            x = x + torch.roll(y, (shift, shift), (1, 2))
        target = (batch.mean((1, 2, 3)) > 0).long()
        return F.cross_entropy(self.head(x.mean((1, 2))), target)


class Classifier(Job):
    def __init__(self) -> None:
        super().__init__()
        self.vit = Pictures(WIDTH, HEADS, 3)

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self.vit(batch), (batch.mean((1, 2, 3)) > 0).long())


class Distilled(Job):
    """A teacher that is the moving average of its student."""

    def __init__(self) -> None:
        super().__init__()
        self.student = Stack(lambda: layers.EinsumAttention(WIDTH, HEADS), out=8)

    def after_build(self) -> None:
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def loss(self, batch: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(batch).softmax(-1)
        noisy = torch.where(torch.rand(batch.shape) < 0.2, torch.ones_like(batch), batch)
        return -(wanted * self.student(noisy).log_softmax(-1)).sum(-1).mean()

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.lerp_(new, 0.1)


class Preferred(Job):
    """A policy against the frozen model that it began as."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = Stack(lambda: layers.CausalSelfAttention(WIDTH, HEADS))

    def after_build(self) -> None:
        self.reference = copy.deepcopy(self.policy).eval().requires_grad_(False)
        with torch.no_grad():
            for parameter in self.policy.parameters():  # else the two have the same numbers
                parameter.add_(torch.randn_like(parameter) * 0.02)

    def loss(self, batch: Tensor) -> Tensor:
        def score(model: nn.Module, tokens: Tensor) -> Tensor:
            picked = model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
            return picked.squeeze(-1).sum(-1)

        chosen, rejected = batch.chunk(2)
        margin = score(self.policy, chosen) - score(self.policy, rejected)
        with torch.no_grad():
            before = score(self.reference, chosen) - score(self.reference, rejected)
        return -F.logsigmoid(0.1 * (margin - before)).mean()


class Latents(Job):
    """Latents read a long input of another width, then each other."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, WIDTH))
        self.cross = nn.ModuleList([layers.LatentAttention(WIDTH, 20) for _ in range(2)])
        self.own = nn.ModuleList([layers.LatentAttention(WIDTH) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def loss(self, batch: Tensor) -> Tensor:
        x = self.latents.expand(len(batch), -1, -1)
        for cross, own in zip(self.cross, self.own, strict=True):
            x = x + cross(self.norm(x), context=batch)
            x = x + own(self.norm(x))
        return F.cross_entropy(self.head(x.mean(1)), (batch[:, 0, 0] > 0).long())


class Packed(Words):
    """Several documents in a row, which do not see each other."""

    def __init__(self) -> None:
        super().__init__(lambda: layers.CausalSelfAttention(WIDTH, HEADS))

    def loss(self, batch: Tensor) -> Tensor:
        documents = torch.cumsum((batch == 1).long(), dim=1)
        same = documents[:, :, None] == documents[:, None]
        out = self.net(batch, (same & layers.causal(batch.shape[1]))[:, None])
        return F.cross_entropy(out[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


class Tasks(Job):
    """Two tasks on one trunk, whose layers are left out at random."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Stack(lambda: layers.MaskedAttention(WIDTH, HEADS), depth=3)
        self.first, self.second = nn.Linear(WORDS, 3), nn.Linear(WORDS, 1)
        self.ran: list[tuple[bool, ...]] = []

    def loss(self, batch: Tensor) -> Tensor:
        trunk = self.trunk
        x = trunk.words(batch) + trunk.places.weight[: batch.shape[1]]
        keep = tuple((torch.rand(len(trunk.blocks)) > 0.5).tolist())
        self.ran.append(keep)
        for kept, block in zip(keep, trunk.blocks, strict=True):
            if kept:
                x = block(x)
        x = trunk.head(trunk.norm(x)).mean(1)
        return F.cross_entropy(self.first(x), batch[:, 0] % 3) + self.second(x).square().mean()


@dataclass(frozen=True)
class Shape:
    """One job.

    Attributes:
        build: the job.
        data: one example's random fields, from a generator.
        attention: how many layers have a softmax over tokens.
        cross: how many of them are cross-attention.
        idle: parts of the names of what is not trained: in no mean over the model.
        validates: whether there is a validation loop.
    """

    build: Callable[[], Job]
    data: Callable[[torch.Generator], Any]
    attention: int
    cross: int = 0
    idle: str | None = None
    validates: bool = False


def words(generator: torch.Generator) -> Tensor:
    return torch.randint(2, WORDS, (LENGTH,), generator=generator)


def documents(generator: torch.Generator) -> Tensor:
    """Words, and a 1 where a document begins."""
    tokens = words(generator)
    tokens[torch.randint(2, LENGTH - 1, (2,), generator=generator)] = 1
    return tokens


def floats(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator)


def both(*parts: Callable) -> Callable[[torch.Generator], tuple]:
    return lambda generator: tuple(part(generator) for part in parts)


IMAGES = floats(3, 8, 8)

SHAPES = {
    "own-softmax": Shape(
        lambda: Words(lambda: layers.MaskedAttention(WIDTH, HEADS), layers.causal(LENGTH)), words, 2
    ),
    "unnamed": Shape(
        lambda: Words(lambda: layers.MaskedSoftmax(WIDTH, HEADS), layers.causal(LENGTH)), words, 2
    ),
    "einsum": Shape(lambda: Words(lambda: layers.EinsumAttention(WIDTH, HEADS)), words, 2),
    "interleaved": Shape(lambda: Words(lambda: layers.InterleavedAttention(WIDTH, HEADS)), words, 2),
    "informer": Shape(Forecast, floats(LENGTH, 3), 2),
    "conformer": Shape(Conformer, floats(LENGTH, 5), 2),
    "siamese": Shape(Siamese, words, 2),
    "gan": Shape(Adversaries, floats(LENGTH, 3), 3),
    "clip": Shape(Towers, both(IMAGES, words), 4),
    "lora": Shape(Adapted, words, 2),
    "detr": Shape(Detector, IMAGES, 6, cross=2),
    "whisper": Shape(Speech, both(floats(8, 20), words), 6, cross=2, validates=True),
    "annotated": Shape(Annotated, words, 6, cross=2),
    "grouped": Shape(lambda: Words(lambda: layers.GroupedAttention(WIDTH, HEADS, 2, 8)), words, 2),
    "swin": Shape(Windows, floats(3, 16, 16), 2),
    "vit": Shape(Classifier, IMAGES, 2),
    "ema-teacher": Shape(Distilled, words, 4, idle="teacher"),
    "frozen-reference": Shape(Preferred, words, 4, idle="reference"),
    "perceiver": Shape(Latents, floats(LENGTH, 20), 4, cross=2),
    "nano-gpt": Shape(lambda: Words(lambda: layers.CausalSelfAttention(WIDTH, HEADS)), words, 2),
    "packed": Shape(Packed, documents, 2),
    "layerdrop": Shape(Tasks, words, 3),
}


def build(shape: Shape) -> Job:
    """The job, with weights large enough for attention that is far from uniform and far from one key."""
    torch.manual_seed(7)
    job = shape.build()
    with torch.no_grad():
        for name, parameter in job.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.4 * parameter[0].numel() ** -0.5 if "words" not in name else 1.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    if hasattr(job, "after_build"):
        job.after_build()
    return job


def loader(shape: Shape, count: int = 48) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    return DataLoader([shape.data(generator) for _ in range(count)], batch_size=4)
