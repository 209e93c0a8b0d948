"""Tokenizers of the mini world, learnt from the prompts of the renders.

CLIP's byte-level pairs and BERT's word pieces.
"""

import json

CONTEXT = 40  # tokens; 99.9 % of the renders' prompts fit
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(prompts, size=1400):
    """Learn a `transformers.CLIPTokenizer`.

    Every byte inside and at the end of a word, then merged pairs, END last as in CLIP.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    untrained = CLIPTokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=[],
        show_progress=False,
    )
    untrained.train_from_iterator(prompts, trainer)
    merges = [tuple(pair) for pair in json.loads(untrained.to_str())["model"]["merges"]]
    words = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {word: number for number, word in enumerate([*dict.fromkeys(words), START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def bert_tokenizer(prompts, size=700):
    """Learn a `transformers.BertTokenizer`, BLIP's kind, with BLIP's two extra tokens."""
    from tokenizers import trainers
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    untrained = BertTokenizer().backend_tokenizer
    untrained.train_from_iterator(
        prompts,
        trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False),
    )
    vocabulary = untrained.get_vocab()
    tokenizer = BertTokenizer(
        vocab=dict(sorted(vocabulary.items(), key=lambda item: item[1])), model_max_length=CONTEXT
    )
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer
