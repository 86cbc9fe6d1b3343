"""Small pooling models made here: a random embedding model with the files of sentence-transformers,
and classifiers and a cross-encoder that are trained in seconds. And what transformers itself makes
of a text, computed as those files say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
)

TOPICS = {
    "food": "bread cheese soup apple butter salt pepper onion rice honey",
    "sea": "wave ship harbour sail anchor tide salmon reef captain storm",
    "music": "violin drum melody chorus rhythm concert trumpet singer piano song",
}
OTHERS = "the a of and is in on with what who where we they old new small"
WORDS = [word for words in (*TOPICS.values(), OTHERS) for word in words.split()]
HIDDEN = 64
DIMENSIONS = (16, 32, HIDDEN)


def make_tokenizer(folder: Path) -> Any:
    """Of whole words."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(WORDS))]
    file = folder / "vocab.txt"
    file.write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(file), do_lower_case=True, model_max_length=128)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _config(tokenizer: Any, *, spread: float = 0.1, **fields: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=spread,
        **fields,
    )


def make_embedder(folder: Path) -> Path:
    """Mean pooling, then normalization; Matryoshka, as its configuration says."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder)
    # Larger weights than usual, or all texts of a random model would be alike.
    config = _config(tokenizer, spread=0.3, matryoshka_dimensions=list(DIMENSIONS))
    BertModel(config, add_pooling_layer=False).eval().save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, (path, kind) in enumerate(kinds.items())
    ]
    pooling = {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": 128, "do_lower_case": False},
        "config_sentence_transformers.json": {"__version__": {}},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def _sentence(topic: str, generator: torch.Generator, *, length: int = 3) -> str:
    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    words = [pick(TOPICS[topic].split()) for _ in range(length)]
    return " ".join([pick(OTHERS.split()), *words])


def _train(model: Any, tokenizer: Any, batches: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for texts, labels in batches:
        encoded = tokenizer(*texts, padding=True, return_tensors="pt")
        loss = model(**encoded, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _classifier(tokenizer: Any, generator: torch.Generator) -> Any:
    names = dict(enumerate(TOPICS))
    config = _config(tokenizer, id2label=names, label2id={v: k for k, v in names.items()})
    model = BertForSequenceClassification(config).train()

    def batches(count: int) -> Any:
        for _ in range(count):
            labels = torch.randint(3, (32,), generator=generator)
            texts = [_sentence(names[int(label)], generator) for label in labels]
            yield (texts,), labels

    _train(model, tokenizer, batches(60))
    return model.eval()


def make_classifier(folder: Path) -> Path:
    """Trained to name the topic of a text."""
    torch.manual_seed(0)
    _classifier(make_tokenizer(folder), torch.Generator().manual_seed(0)).save_pretrained(folder)
    return folder


def make_cross_encoder(folder: Path) -> Path:
    """Trained to give a document of the query's topic a higher score, when it knows the topics."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    tokenizer = make_tokenizer(folder)
    config = _config(tokenizer, num_labels=1, problem_type="multi_label_classification")
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(_classifier(tokenizer, generator).bert.state_dict())
    topics = list(TOPICS)

    def batches(count: int) -> Any:
        for _ in range(count):
            asked = torch.randint(3, (32,), generator=generator).tolist()
            told = torch.randint(3, (32,), generator=generator).tolist()
            told[::2] = asked[::2]  # more than half belong together
            queries = [_sentence(topics[topic], generator, length=2) for topic in asked]
            documents = [_sentence(topics[topic], generator, length=4) for topic in told]
            same = [[float(one == two)] for one, two in zip(asked, told, strict=True)]
            yield (queries, documents), torch.tensor(same)

    _train(model.train(), tokenizer, batches(80))
    model.config.problem_type = None  # as cross-encoders are published
    model.eval().save_pretrained(folder)
    return folder


@torch.inference_mode()
def embeddings(folder: Path, texts: Sequence[str], dimensions: int | None = None) -> torch.Tensor:
    """What transformers makes of the texts: the mean over tokens, normalized. float32 (N, D)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    longest = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    found = []
    for text in texts:
        encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=longest)
        found.append(model(**encoded).last_hidden_state[0].mean(dim=0)[:dimensions])
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


@torch.inference_mode()
def logits(folder: Path, *sides: Sequence[str]) -> torch.Tensor:
    """What transformers' classifier says of texts, or of pairs. float32 (N, labels)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [
        model(**tokenizer(*texts, return_tensors="pt")).logits[0]
        for texts in zip(*sides, strict=True)
    ]
    return torch.stack(rows)
