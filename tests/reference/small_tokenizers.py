"""Makes tests/data/tokenizers: small vocabularies of our own and the ids that transformers gives with them.

    pip install transformers==4.57.6 sentencepiece==0.2.3 protobuf
    python tests/reference/small_tokenizers.py [FOLDER]

clip        vocab.json and merges.txt as the slow CLIPTokenizer saves them, all 512 byte symbols, EOS as padding
clip_ascii  tokenizer.json as CLIPTokenizerFast saves it, ids in another order, printable ASCII alone (so that
            the rest is unknown), "!" as padding like CLIP-G
t5          spiece.model, unigram, with a small normalization table in place of nmt_nfkc, whose table alone
            has 240 KB
expected.json  for every text the ids of CLIPTokenizerFast (no BOS, EOS) and T5TokenizerFast (with EOS), and the
            same padded and truncated to 12; for a long one to 77 and 256. `slow` marks the texts on which the
            slow CLIPTokenizer without ftfy differs; the C++ follows the fast one.
"""

import collections
import io
import json
import os
import random
import sys
import tempfile

import sentencepiece
from transformers import CLIPTokenizer, CLIPTokenizerFast, T5TokenizerFast

SENTENCES = """a photo of a cat sitting on the red sofa
the small red lantern hung above the wooden door
an oil painting of a castle on a hill at sunset, highly detailed
two dogs and three birds in the garden; it's raining
portrait of an old sailor with a white beard, 35mm, f/1.8
a lovely cat, holding a sign that says hello world!
they're late, we'll walk, I'm sure you've seen it, he'd say don't
a café by the river, naïve art, über straße
2048x2048 photograph, ISO-100, 0123456789
<|unlikely|> (masterpiece:1.3), [best quality], {portrait}""".splitlines()

TEXTS = [
    "", " ", "\t\n", "a", "a photo of a cat", "A Photo Of A CAT", "  a   photo\tof\r\na  cat  ",
    "a lovely cat, holding a sign that says 'hello world'!", "don't we'll I'M they're it's you've he'd",
    "'s 'S ''s 'shell 'x' rock'n'roll", "2048x2048 photo, f/1.8, 35mm; ISO-100", "0 12 345 1,000,000",
    "½ Ⅷ ⅷ ² ٣٤ ४२", "(masterpiece:1.3), [best quality], {portrait}", "escaped \\(parens\\) stay", "!!! ?? ... ---",
    "naïve café über straße", "cafe\u0301 u\u0308ber", "a\u0301\u0327 a\u0327\u0301", "“quotes” — dash …", "東京タワー", "日本 語",
    "🐱", "a 🐱 cat 👨\u200d👩\u200d👧 1\ufe0f\u20e3", "Привет, МИР", "ΟΔΟΣ", "İstanbul", "ẞ ſ K", "हिन्दी", "עברית العربية",
    "\u1100\u1161\u11a8 가", "ﬁne ｆｕｌｌ", "a\u00a0b\u3000c\u2028d\u0085e", "a\u200bb", "a\u00adb", "a\x00b", "a\x1cb", "a\ufffdb",
    "<|endoftext|> inside", "a<|startoftext|>b", "!<|endoftext|>!", "<|EndOfText|>", "<|endoftext", "a</w>b",
    "a </s> b", "a</s>b", "</s></s>", "<pad> <unk>", "<extra_id_0> a<extra_id_99>", "<extra_id_100> <extra_id_01>",
    "</S> <s> <", "a▁b ▁ c", "☃ ☃☃ a☃b", "lalala" * 40, "https://example.org/a?b=c&d=%20#e", "tab\there",
]
LONG = " ".join(f"word{i} of a photo" for i in range(120))
UNIT, TIMES = "catsofa", 20000  # one word of 140 KB

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def byte_symbols():
    printing = [b for b in range(256) if 33 <= b <= 126 or (b >= 161 and b != 173)]
    rest = [b for b in range(256) if b not in printing]
    return dict([(b, chr(b)) for b in printing] + [(b, chr(256 + i)) for i, b in enumerate(rest)])


def train_bpe(sentences, count):
    """Merges the most frequent pair, the first in alphabetic order of equals, `count` times."""
    table = byte_symbols()
    words = collections.Counter()
    for word in " ".join(sentences).lower().split():
        symbols = [table[b] for b in word.encode()]
        symbols[-1] += "</w>"
        words[tuple(symbols)] += 1
    merges = []
    while len(merges) < count:
        pairs = collections.Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if "".join(best) in {"".join(m) for m in merges}:
            raise SystemExit(f"two merges make {''.join(best)}: choose other sentences")
        merges.append(best)
        merged = collections.Counter()
        for word, n in words.items():
            out = []
            for symbol in word:
                if out and (out[-1], symbol) == best:
                    out[-1] += symbol
                else:
                    out.append(symbol)
            merged[tuple(out)] += n
        words = merged
    return merges


def write_clip(folder, symbols, merges):
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/vocab.json", "w", encoding="utf-8") as file:
        json.dump({symbol: i for i, symbol in enumerate(symbols)}, file, ensure_ascii=False, separators=(",", ":"))
    with open(f"{folder}/merges.txt", "w", encoding="utf-8") as file:
        file.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def make_clip(folder):
    merges = train_bpe(SENTENCES, 160)
    base = list(byte_symbols().values())
    symbols = base + [s + "</w>" for s in base] + [a + b for a, b in merges] + [BOS, EOS]
    write_clip(folder, symbols, merges)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        with open(f"{folder}/{name}", "w", encoding="utf-8") as file:
            json.dump({"bos_token": {"content": BOS}, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}, file)
            file.write("\n")


def make_clip_ascii(folder):
    merges = train_bpe([s.encode("ascii", "ignore").decode() for s in SENTENCES], 120)
    base = [chr(b) for b in range(33, 127)]
    symbols = base[1:] + [s + "</w>" for s in base] + [a + b for a, b in merges] + [BOS, EOS]
    random.Random(1).shuffle(symbols)
    with tempfile.TemporaryDirectory() as temporary:
        write_clip(temporary, ["!"] + symbols, merges)
        # pad_token as in the tokenizer of CLIP-G
        fast = CLIPTokenizerFast(f"{temporary}/vocab.json", f"{temporary}/merges.txt", pad_token="!")
        fast.save_pretrained(temporary)
        os.makedirs(folder, exist_ok=True)
        for name in ("tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"):
            with open(f"{temporary}/{name}", encoding="utf-8") as file:
                content = json.load(file)
            with open(f"{folder}/{name}", "w", encoding="utf-8") as file:
                json.dump(content, file, ensure_ascii=False, separators=(",", ":"))
                file.write("\n")


def make_t5(folder):
    os.makedirs(folder, exist_ok=True)
    rules = {c: " " for c in "\t\n\r\u00a0\u3000\u2028\u0085\u200b\ufffd"}
    rules |= {chr(0xFEE0 + c): chr(c) for c in range(33, 127)}  # full width to ASCII
    rules |= {"ﬁ": "fi", "…": "...", "½": "1⁄2", "²": "2", "e\u0301": "é", "u\u0308": "ü"}
    model = io.BytesIO()
    back = os.getcwd()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)  # the model records the name of the table
        with open("rules.tsv", "w", encoding="utf-8") as file:
            for source, target in rules.items():
                file.write("\t".join(" ".join(f"{ord(c):X}" for c in side) for side in (source, target)) + "\n")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES), model_writer=model, model_type="unigram", vocab_size=160,
            hard_vocab_limit=False, character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1,
            normalization_rule_tsv="rules.tsv", minloglevel=2)
        os.chdir(back)
    with open(f"{folder}/spiece.model", "wb") as file:
        file.write(model.getvalue())


def expected(folder):
    clip = CLIPTokenizerFast.from_pretrained(f"{folder}/clip")
    slow = CLIPTokenizer.from_pretrained(f"{folder}/clip")
    # The class, not its folder: so nothing but tokenizer.json speaks.
    ascii_clip = CLIPTokenizerFast(tokenizer_file=f"{folder}/clip_ascii/tokenizer.json", pad_token="!")
    t5 = T5TokenizerFast.from_pretrained(f"{folder}/t5")

    def ids(tokenizer, text, special):
        return tokenizer(text, add_special_tokens=special).input_ids

    def padded(tokenizer, text, length):
        return tokenizer(text, padding="max_length", truncation=True, max_length=length).input_ids

    cases = []
    for text in TEXTS:
        case = {"text": text}
        for name, tokenizer in (("clip", clip), ("clip_ascii", ascii_clip), ("t5", t5)):
            case[name] = ids(tokenizer, text, name == "t5")
            case[name + "_12"] = padded(tokenizer, text, 12)
        if ids(slow, text, False) != case["clip"]:
            case["slow"] = "differs"
        cases.append(case)
    word = ids(clip, UNIT * TIMES, False)
    return {
        "note": "made by tests/reference/small_tokenizers.py with transformers 4.57.6; see there",
        "cases": cases,
        "truncated": {"text": LONG, "clip": padded(clip, LONG, 77), "clip_ascii": padded(ascii_clip, LONG, 77),
                      "t5": padded(t5, LONG, 256)},
        "one_word": {"unit": UNIT, "times": TIMES, "count": len(word), "sum": sum(word)},
    }


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "..", "data", "tokenizers")
    make_clip(f"{folder}/clip")
    make_clip_ascii(f"{folder}/clip_ascii")
    make_t5(f"{folder}/t5")
    answer = expected(folder)
    with open(f"{folder}/expected.json", "w", encoding="utf-8") as file:
        cases = answer.pop("cases")
        lines = [json.dumps(case, separators=(",", ":")) for case in cases]
        head = json.dumps(answer, separators=(",", ":"))
        file.write(head[:-1] + ',"cases":[\n' + ",\n".join(lines) + "\n]}\n")
    differ = [case["text"] for case in cases if "slow" in case]
    print(f"{len(cases)} texts; the slow CLIPTokenizer differs on {len(differ)}: {differ}")


if __name__ == "__main__":
    main()
