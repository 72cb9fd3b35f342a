"""The world's tokenizer: byte-level BPE in which every word of the world is one token.

Qwen2.5-VL's tokenizer has 151,936 entries; a model of a million parameters cannot afford them. This one has the 256
bytes, so that any text can be encoded, the words of the closed language, the markers of reasoning paths and the chat
specials of the Qwen2.5-VL family, under the family's own names and with a chat template of the same shape.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from srpo_jax.data.world.language import PIECE_PATTERN, vocabulary
from srpo_jax.paths import Grammar

MAX_ENTRIES = 600
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_WORDS = ("user", "assistant", "system", "\n", "\n\n")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen-style turns, without a default system message."""


def build_tokenizer(grammar: Grammar | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer, always the same entries in the same order.

    Args:
      grammar: its opening, closing and step headings become single ordinary (not special) tokens.

    Raises:
      ValueError: if the vocabulary would exceed `MAX_ENTRIES`.
    """
    grammar = grammar or Grammar()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [_byte_level(word) for word in (*CHAT_WORDS, *vocabulary())]
    entries = list(dict.fromkeys([*alphabet, *words]))
    # No merges: a piece that is an entry becomes that entry (`ignore_merges`), any other piece falls into its bytes.
    model = models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    headings = [grammar.heading_line(number) for number in range(1, len(grammar.titles) + 1)]
    markers = [grammar.opening, grammar.closing, *headings]
    tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIALS])
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in markers])
    if tokenizer.get_vocab_size() > MAX_ENTRIES:
        raise ValueError(f"{tokenizer.get_vocab_size()} entries; the world's tokenizer may have {MAX_ENTRIES}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[s for s in SPECIALS if s not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def _byte_level(text: str) -> str:
    """`text` in the printable alphabet in which byte-level BPE writes bytes."""
    [(piece, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return piece
