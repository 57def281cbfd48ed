"""Small tokenizers in the style of each family: its special tokens, splits and chat template.

The chat templates lie in templates/; families.py uses this file. qwen2, qwen2_5, qwen3, mistral_v3,
smollm2, yi and yi1_5 are those of the published checkpoints (Apache-2.0). llama2, llama3, llama3_1,
deepseek and minimind are our own words for what the published ones render without tools.
"""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEMPLATES = Path(__file__).resolve().parent / "templates"

TEXT = """The quick brown fox jumps over the lazy dog; the river runs to the sea. In 1969 people
walked on the Moon for the first time; they'd trained for 8 years. What is 12 + 35? It's 47!
Write a short poem about the winter, explain why the sky is blue. Sure! Here is a list:
1. Read the question.  2. Think step by step.    3. Answer it. def f(x): return x * 2
You are a helpful assistant. Hello, how are you? I am fine, thank you! Who are you? It is (B).
A language model is trained on text, and later tuned to follow instructions and to be helpful.
床前明月光，疑是地上霜。举头望明月，低头思故乡。今天天气很好，我们去公园散步吧！请用中文回答下面的问题：
中国的首都是哪里？北京是中国的首都。你是谁？我是一个人工智能助手，很高兴为你服务。请写一首关于春天的诗。
学而时习之，不亦说乎？有朋自远方来，不亦乐乎？大语言模型经过微调以后，可以更好地回答用户的问题。谢谢你的帮助！
"""

# Pre-tokenizer regexes of the real tokenizers (Llama-3 differs from Qwen in \p{N}{1,3} only).
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
              r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
# DeepSeek-LLM: only the first ranges of its (very long) letters class.
DEEPSEEK_SPLITS = [r"[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶ-ϿЀ-ҁҊ-ԯԱ-Ֆ]+",
                   r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", r"[一-龥ࠀ-一가-퟿]+"]

QWEN2_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN25_TOKENS = QWEN2_TOKENS + [f"<|{name}|>" for name in (
    "object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end "
    "vision_pad image_pad video_pad").split()] + ["<tool_call>", "</tool_call>"] + [
    f"<|{name}|>" for name in "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep".split()]
QWEN3_TOKENS = QWEN25_TOKENS + ["<tool_response>", "</tool_response>", "<think>", "</think>"]
# Added tokens that the real tokenizers do not mark special: decoding keeps them.
PLAIN_TOKENS = set(QWEN25_TOKENS[14:] + QWEN3_TOKENS[-4:])
LLAMA3_TOKENS = [f"<|{name}|>" for name in (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
    "finetune_right_pad_id reserved_special_token_2 start_header_id end_header_id eom_id eot_id "
    "python_tag").split()]
MISTRAL_TOKENS = "<unk> <s> </s> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS]".split() + [
    "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
YI_TOKENS = ("<unk> <|startoftext|> <|endoftext|> <|Human|> <|Assistant|> <|System|> <|im_start|> "
             "<|im_end|>").split()

# Normalizers, special tokens and add_bos are from memory of the published tokenizer.json files.
# kind: "prepend" (Llama-2: "▁" before the text and after every special token), "metaspace"
# (Mistral v3: "▁" before the text only), "replace" (Yi: no "▁" added), or a byte-level split.
# first: the special tokens come before the vocabulary. add_bos: encode() puts bos in front.
_SP = dict(bos="<s>", eos="</s>", pad=None, unk="<unk>", add_bos=True, first=True)
TOKENIZERS = {
    "llama2": dict(_SP, kind="prepend", tokens=["<unk>", "<s>", "</s>"], template="llama2"),
    "tinyllama": dict(_SP, kind="prepend", tokens=["<unk>", "<s>", "</s>"], pad="</s>",
                      template=None),
    "mistral": dict(_SP, kind="metaspace", tokens=MISTRAL_TOKENS, template="mistral_v3"),
    "yi": dict(_SP, kind="replace", tokens=YI_TOKENS, bos="<|startoftext|>", eos="<|im_end|>",
               pad="<unk>", add_bos=False, template="yi"),
    "yi1_5": dict(_SP, kind="prepend", tokens=YI_TOKENS, bos="<|startoftext|>", eos="<|im_end|>",
                  pad="<unk>", add_bos=False, template="yi1_5"),
    "llama3": dict(kind="llama3", tokens=LLAMA3_TOKENS, bos="<|begin_of_text|>", eos="<|eot_id|>",
                   pad=None, add_bos=True, template="llama3"),
    "smollm2": dict(kind="smollm2", tokens=QWEN2_TOKENS, first=True, bos="<|im_start|>",
                    eos="<|im_end|>", pad="<|im_end|>", unk="<|endoftext|>", template="smollm2"),
    "deepseek": dict(kind="deepseek", tokens=["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
                     bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>",
                     pad="<｜end▁of▁sentence｜>", add_bos=True, template="deepseek"),
    "qwen2": dict(kind="qwen", tokens=QWEN2_TOKENS, bos=None, eos="<|im_end|>",
                  pad="<|endoftext|>", template="qwen2"),
}
TOKENIZERS["qwen2_5"] = dict(TOKENIZERS["qwen2"], tokens=QWEN25_TOKENS, template="qwen2_5")
TOKENIZERS["qwen3"] = dict(TOKENIZERS["qwen2"], tokens=QWEN3_TOKENS, template="qwen3")
TOKENIZERS["llama3_1"] = dict(TOKENIZERS["llama3"], template="llama3_1",
                              pad="<|finetune_right_pad_id|>",
                              stops=["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
TOKENIZERS["minimind"] = dict(TOKENIZERS["qwen3"], template="minimind")


def _byte_level(kind):
    """The pre-tokenizer of a byte-level tokenizer."""
    if kind == "smollm2":
        return pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    splits = {"qwen": [QWEN_SPLIT], "llama3": [LLAMA3_SPLIT], "deepseek": DEEPSEEK_SPLITS}[kind]
    steps = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
    if kind == "deepseek":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    return pre_tokenizers.Sequence(
        steps + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _train(pre_tokenizer, alphabet, size):
    """(pieces, merges) of a byte-pair encoding trained on TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    return pieces, [tuple(pair) for pair in model["merges"]]


def _build(spec):
    """The tokenizers.Tokenizer of one entry of TOKENIZERS."""
    kind, named = spec["kind"], spec["tokens"]
    sentencepiece = kind in ("prepend", "metaspace", "replace")
    if sentencepiece:
        pieces, merges = _train(pre_tokenizers.Metaspace(prepend_scheme="always"), [], 700)
        pieces = [f"<0x{byte:02X}>" for byte in range(256)] + pieces
        options = dict(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    else:
        pieces, merges = _train(_byte_level(kind), pre_tokenizers.ByteLevel.alphabet(), 700)
        options = dict(ignore_merges=True) if kind == "llama3" else {}
    pieces = named + pieces if spec.get("first") else pieces
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.add_tokens([AddedToken(token, special=token not in PLAIN_TOKENS, normalized=False)
                          for token in named])
    if sentencepiece:
        replace = normalizers.Replace(" ", "▁")
        if kind == "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        elif kind == "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        else:
            tokenizer.normalizer = normalizers.Sequence([replace])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        strip = [] if kind == "replace" else [decoders.Strip(" ", left=1, right=0)]
        tokenizer.decoder = decoders.Sequence(steps + strip)
    else:
        tokenizer.normalizer = normalizers.NFC() if kind == "qwen" else None
        tokenizer.pre_tokenizer = _byte_level(kind)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if spec.get("add_bos"):
        bos = spec["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer


def write_tokenizer(folder, name, style="old"):
    """Write tokenizer.json and tokenizer_config.json; return the tokenizers.Tokenizer.

    The chat template goes into tokenizer_config.json ("old") or chat_template.jinja ("new").
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = TOKENIZERS[name]
    tokenizer = _build(spec)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {role + "_token": spec.get(role) for role in ("bos", "eos", "pad", "unk")}
    # LlamaTokenizer would make transformers 5 rebuild the pre-tokenizer and change ids.
    config.update(tokenizer_class="PreTrainedTokenizerFast", model_max_length=128,
                  clean_up_tokenization_spaces=False)
    if spec["template"]:
        template = (TEMPLATES / (spec["template"] + ".jinja")).read_text(encoding="utf-8")
        if style == "new":
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        else:
            config["chat_template"] = template
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return tokenizer
