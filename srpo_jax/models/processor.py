"""Images and questions to model inputs, and token ids back to text.

Text of users, of records and of the model is data, never markup: it is tokenised with special tokens switched off, so a
question that spells `<|im_end|>` or `<|image_pad|>` becomes the ordinary characters. Only the chat template can place
special tokens. For that the template is rendered around a mark in place of the question, and the pieces are tokenised
apart. (A text-only question that starts with a line break is therefore tokenised apart from the template's own.)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from srpo_jax.inputs import Encoded
from srpo_jax.models import geometry
from srpo_jax.models.config import ModelConfig

_MARK = "\ue000the question\ue001"  # private-use characters, which no template holds
THINK_TOKENS = ("<think>", "</think>")
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")


class Processor:
    """The tokenizer, chat template and image settings of one checkpoint.

    Attributes:
      tokenizer: Hugging Face tokenizer with a chat template.
      image_processor: normalisation and patch order; its `size` holds `min_pixels` and `max_pixels`.
      config: the model that it feeds.
      max_image_tokens: tokens that the images of one prompt may take together; the largest images shrink to fit.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Qwen2VLImageProcessorPil,
        config: ModelConfig,
        max_image_tokens: int | None = None,
        stop_ids: Sequence[int] = (),
    ):
        """Checks that the three parts belong together. `stop_ids` end a turn beside the tokenizer's end-of-turn.

        Raises:
          ValueError: patch sizes or token ids that differ from `config`, no chat template, or one that does not place
            images and the question.
        """
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.max_image_tokens = max_image_tokens
        self.stop_ids = tuple(dict.fromkeys((tokenizer.eos_token_id, *stop_ids)))
        # A fast tokenizer keeps the switch for special tokens as state. One tokenizer per setting makes calls from
        # several threads safe.
        self._literal = copy.deepcopy(tokenizer)
        self._frames: dict[tuple[int, str], tuple[list[int], list[int]]] = {}
        vision = config.vision
        wanted = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        given = (image_processor.patch_size, image_processor.temporal_patch_size, image_processor.merge_size)
        if wanted != given:
            raise ValueError(f"image processor has (patch, temporal, merge) sizes {given}, the model {wanted}")
        if len(tokenizer) > config.text.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {config.text.vocab_size}")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer names no eos_token; it must be the end of a turn")
        visual = {
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        }
        self._reserved = frozenset(tokenizer.all_special_ids) | visual
        self._reserved -= set(tokenizer.convert_tokens_to_ids(list(THINK_TOKENS))) - {tokenizer.unk_token_id}
        self._frame(1)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        config: ModelConfig,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_image_tokens: int | None = None,
    ) -> Processor:
        """Reads tokenizer, chat template and image settings from a folder in Hugging Face's format; never from the hub.

        Args:
          folder: the checkpoint.
          config: the model's configuration.
          min_pixels: replaces the checkpoint's smallest image area.
          max_pixels: replaces the checkpoint's largest image area.
          max_image_tokens: see the class.

        Raises:
          FileNotFoundError: no such folder.
          ValueError: an unreadable part, or parts that do not fit `config`.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        bounds: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            template = folder / "chat_template.json"  # where the released checkpoints keep the processor's template
            if template.is_file():
                tokenizer.chat_template = json.loads(template.read_text(encoding="utf-8"))["chat_template"]
        except Exception as error:  # the tokenizers library raises bare exceptions
            raise ValueError(f"{folder}: the tokenizer or chat template cannot be read ({error})") from error
        try:
            images = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True, **bounds)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: preprocessor_config.json cannot be read ({error})") from error
        return cls(tokenizer, images, config, max_image_tokens, _stop_ids(folder / "generation_config.json"))

    def save(self, folder: str | Path) -> None:
        """Writes what transformers reads: tokenizer files, `chat_template.jinja`, `preprocessor_config.json`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a turn in training data; `stop_ids` are all that end one in sampling."""
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """Id of the padding token; that of the end of a turn where the tokenizer has none."""
        return self.eos_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer knows; the model's logits may have more."""
        return len(self.tokenizer)

    @property
    def min_pixels(self) -> int:
        """Smallest area of an image after resizing."""
        return self.image_processor.size["shortest_edge"]

    @property
    def max_pixels(self) -> int:
        """Largest area of an image after resizing."""
        return self.image_processor.size["longest_edge"]

    def encode(self, images: Sequence[Image.Image], question: str, system: str = "") -> Encoded:
        """The prompt of one turn in the chat template, up to and including the start of the reply.

        Args:
          images: any number of still images, which come before the question.
          question: plain text.
          system: the system turn, which is ours and part of the template; "" for the template's default.

        Raises:
          ValueError: an unreadable or empty image, a video, images beyond the token budget, or a prompt longer than the
            model's context.
        """
        if not isinstance(question, str):
            raise ValueError(f"the question must be text, got {type(question).__name__}")
        stills = [_rgb(image, number) for number, image in enumerate(images, start=1)]
        patches, grids = self._patches(stills)
        before, after = self._frame(len(stills), system)
        counts = iter(rows * columns for rows, columns in grids)
        repeats = [next(counts) if token == self.config.image_token_id else 1 for token in before]
        tokens = np.asarray([*np.repeat(before, repeats), *self.tokenize(question), *after], np.int32)
        vision, slots = geometry.lay_out_images(patches, grids, self.config.vision) if stills else (None, [])
        encoded = Encoded(
            tokens=tokens,
            positions=geometry.mrope_positions(tokens, grids, self.config),
            image_slots=geometry.image_slots(tokens, grids, slots, self.config),
            vision=vision,
        )
        return self._within(encoded)

    def encode_about(self, images: Sequence[Image.Image], questions: Sequence[str], system: str = "") -> list[Encoded]:
        """As `encode` for each of several questions about the same images, which are resized and cut into patches once."""
        first = self.encode(images, questions[0], system)
        after = self._frame(len(images), system)[1]
        shared = first.prefix(len(first.tokens) - len(after) - len(self.tokenize(questions[0])))
        others = [shared.append([*self.tokenize(question), *after]) for question in questions[1:]]
        return [first, *map(self._within, others)]

    def _within(self, encoded: Encoded) -> Encoded:
        """The prompt itself; ValueError if the context does not hold it."""
        limit = self.config.text.max_position_embeddings
        if len(encoded.tokens) > limit:
            raise ValueError(
                f"the prompt has {len(encoded.tokens)} tokens, the model's context {limit}; shorten the question or lower "
                "max_image_tokens"
            )
        return encoded

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text: nothing is added, and spelled-out special tokens stay ordinary characters.

        Raises:
          ValueError: the tokenizer turns part of the text into a control token all the same.
        """
        ids = self._literal(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if forged := self._reserved.intersection(ids):
            names = self.tokenizer.convert_ids_to_tokens(sorted(forged))
            raise ValueError(f"the text contains the control token(s) {names}; remove them from the data")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids, without an end-of-turn at the end.

        Any other control token that a model wrote stays visible as its name, so that no judge mistakes the text for clean.
        """
        kept = [int(i) for i in ids]
        if kept and kept[-1] in self.stop_ids:
            kept.pop()
        return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _patches(self, images: Sequence[Image.Image]) -> tuple[list[np.ndarray], list[geometry.Size]]:
        """Per image the patches and the grid in merge units."""
        if not images:
            return [], []
        settings = self.image_processor
        factor = settings.patch_size * settings.merge_size
        sizes = geometry.fit_images(
            [(image.height, image.width) for image in images],
            factor,
            self.min_pixels,
            self.max_pixels,
            self.max_image_tokens,
        )
        resized = [
            image.resize((width, height), resample=settings.resample)
            for image, (height, width) in zip(images, sizes, strict=True)
        ]
        grids = [(height // factor, width // factor) for height, width in sizes]
        pixels = settings.preprocess(resized, do_resize=False, do_convert_rgb=False)["pixel_values"]
        ends = np.cumsum([rows * columns * self.config.vision.merge_unit for rows, columns in grids])
        return np.split(np.asarray(pixels, np.float32), ends[:-1]), grids

    def _frame(self, images: int, system: str = "") -> tuple[list[int], list[int]]:
        """Ids of the chat template before and after the question; one image token per image."""
        if (images, system) not in self._frames:
            content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": _MARK}]
            messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": content})
            try:
                rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except (jinja2.TemplateError, ValueError) as error:
                raise ValueError(f"the chat template cannot be rendered ({error})") from error
            parts = rendered.split(_MARK)
            ids = [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
            if len(parts) != 2 or ids[0].count(self.config.image_token_id) != images:
                raise ValueError(
                    "the chat template must hold the question once and, before it, one image token "
                    f"(id {self.config.image_token_id}) per image; it renders {rendered!r}"
                )
            self._frames[images, system] = ids[0], ids[1]
        return self._frames[images, system]


def _rgb(image: Image.Image, number: int) -> Image.Image:
    """Decodes an image; transparency is laid over white, as the released processor does.

    Raises:
      ValueError: not an image, a video, empty, or unreadable.
    """
    if not isinstance(image, Image.Image):
        hint = (
            "; video input is not supported, pass still frames" if isinstance(image, (list, tuple, np.ndarray)) else ""
        )
        raise ValueError(f"image {number} is a {type(image).__name__}, not a PIL image{hint}")
    if not image.width or not image.height:
        raise ValueError(f"image {number} is empty ({image.width}x{image.height} pixels)")
    try:
        # An MPO file is a photograph with previews.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            raise ValueError(f"image {number} has {frames} frames; video input is not supported, pass still frames")
        if image.mode in _TRANSPARENT or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {number} cannot be decoded ({error}); replace the file") from error


def _stop_ids(file: Path) -> list[int]:
    """The token ids that a checkpoint's generation settings call ends of a turn; it may list several."""
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id", [])
        return [int(i) for i in (found if isinstance(found, list) else [found])]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: eos_token_id cannot be read ({error}); it is an id or a list of ids") from error
