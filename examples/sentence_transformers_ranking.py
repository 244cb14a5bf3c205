"""A sentence-transformers model from scratch, with fastcl's MultipleNegativesRankingLoss.

    losses.MultipleNegativesRankingLoss  ->  fastcl.compat.sentence_transformers's

The loop is written out, so that neither `datasets` nor `accelerate` is needed;
SentenceTransformerTrainer takes the same loss.
"""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from fastcl.compat.sentence_transformers import MultipleNegativesRankingLoss

ANIMALS = ["cat", "dog", "horse", "cow", "sheep", "goat", "duck", "swan", "owl", "hawk", "fox"]
QUESTIONS = [f"what does a {animal} eat" for animal in ANIMALS]
ANSWERS = [f"every {animal} has a food that it likes" for animal in ANIMALS]


def main() -> None:
    torch.manual_seed(0)
    words = sorted({word for text in QUESTIONS + ANSWERS for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    embedding = StaticEmbedding(tokenizer, embedding_weights=torch.randn(len(vocabulary), 64))
    model = SentenceTransformer(modules=[embedding], device="cpu")

    loss_of = MultipleNegativesRankingLoss(model, scale=20.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for step in range(20):
        features = [model.preprocess(QUESTIONS), model.preprocess(ANSWERS)]
        loss = loss_of(features, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:2d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
