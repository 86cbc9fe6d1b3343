"""Score the demo model, or an adapter on it, with transformers and PEFT: greedy exact match on
demo/eval.

python demo/score.py                      # the base on every evaluation file
python demo/score.py --adapter clinic     # an adapter on its own questions
    python demo/score.py --model out/demo-int8 --adapter clinic     # on a quantized base
python demo/score.py --wrong 5            # also show five wrong answers of each file
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from domains import ADAPTERS
from transformers import AutoTokenizer

from packhorse.quantize.calibration.dataset import read_texts
from packhorse.quantize.quality import dequantized
from packhorse.quantize.quality.evaluate import (
    greedy_answers,
    perplexity,
    read_questions,
    score,
)

DEMO = Path(__file__).parent


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = dequantized.load(args.model)
    names = ["general", "off_topic", "clinic", "ledger", "code"]
    if args.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, DEMO / "adapters" / args.adapter)
        names = ["clinic-v2" if args.adapter == "clinic-v2" else ADAPTERS[args.adapter]]
    for name in args.only or names:
        questions = read_questions(DEMO / f"eval/{name}.jsonl")
        answers = greedy_answers(model, tokenizer, questions)
        print(
            json.dumps(
                {"file": name, "adapter": args.adapter, **score(questions, answers).as_json()}
            )
        )
        wrong = [
            (q, answer) for q, answer in zip(questions, answers, strict=True) if answer != q.answer
        ]
        for question, answer in wrong[: args.wrong]:
            print(
                f"    {question.messages[-1]['content']}\n"
                f"      said  {answer}\n      right {question.answer}"
            )
    if not args.adapter and not args.only:
        texts = read_texts(DEMO / "eval/held_out_text.jsonl", tokenizer)
        print(json.dumps({"perplexity": round(perplexity(model, texts), 4)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--adapter", help="a folder name in demo/adapters")
    parser.add_argument("--only", nargs="*", help="evaluation files, without .jsonl")
    parser.add_argument("--wrong", type=int, default=0)
    main(parser.parse_args())
