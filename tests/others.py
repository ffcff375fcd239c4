"""Tokenizers as other programs train them: Qwen's, Llama's and SentencePiece's, small."""

import json

QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN2 += r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)

TEXT = (
    "The queries and keys of 300 heads aren't values,\n\n"
    "  they're: 'masks' -- <s> é, ½ क्वेरी कुंजी 键值 🔑!\t\r\n" * 5
)


def byte_level(pattern, normalizer, specials, words=(), processor=None):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=pattern == LLAMA3))
    tokenizer.normalizer = normalizer
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=bytes_alone.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens(list(specials))
    tokenizer.add_tokens(list(words))
    if processor:
        tokenizer.post_processor = processor(tokenizer)
    return tokenizer


def qwen2():
    from tokenizers import normalizers

    specials, words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</think>"]
    return byte_level(QWEN2, normalizers.NFC(), specials, words)


def before(name):
    from tokenizers import processors

    return lambda tokenizer: processors.TemplateProcessing(
        f"{name} $A", f"{name} $A {name} $B", [(name, tokenizer.token_to_id(name))]
    )


def llama3():
    name = "<|begin_of_text|>"
    return byte_level(LLAMA3, None, [name, "<|end_of_text|>", "<|eot_id|>"], processor=before(name))


def llama2():
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=names, limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.split(), trainer)
    content = json.loads(tokenizer.to_str())
    tokenizer = Tokenizer.from_str(json.dumps({**content, "added_tokens": content["added_tokens"][:3]}))
    blank, bytes_of = decoders.Replace("▁", " "), decoders.ByteFallback()
    tokenizer.decoder = decoders.Sequence([blank, bytes_of, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = before("<s>")(tokenizer)
    return tokenizer


def unigram():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer
