# SPDX-License-Identifier: Apache-2.0
"""AdvMoE by hand, on the library's API: Algorithm 1 on scikit-learn's digits, then SA, RA and flipped routings."""

from __future__ import annotations

import argparse

import torch

from advmoe.attacks import PGD, from_name
from advmoe.data import Batches, load, stream_generator
from advmoe.evaluation import evaluate
from advmoe.models import backbone_parameters, create_model, router_parameters
from advmoe.objectives import trades_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    data = load("digits")
    model = create_model("resnet18", "moe", image_size=data.image_size, width=16, mean=data.mean, std=data.std)
    attack = PGD(data.epsilon, data.step_size, steps=2, loss="kl")
    # the two levels of Algorithm 1: routers and backbone, each with its own optimiser and its own batches
    levels = [
        (torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4), Batches(len(data.train), 32, 0, name))
        for name, parameters in (("routers", router_parameters(model)), ("backbone", backbone_parameters(model)))
    ]
    for epoch in range(epochs):
        model.train()
        for step in range(len(levels[0][1])):
            for optimizer, batches in levels:
                images, labels = data.train.batch(batches.next()[0])
                adversarial = attack(model, images, labels, stream_generator(0, batches.name, epoch, step))
                loss = trades_loss(model(images), model(adversarial), labels, beta=6.0)
                model.zero_grad()
                loss.backward()
                optimizer.step()
        print(f"epoch {epoch + 1}: TRADES loss {loss.item():.3f}")
    result = evaluate(model, data.test, {"pgd20": from_name("pgd20", data.epsilon)})
    outcome = result.attacks["pgd20"]
    print(f"SA {result.sa:.1%}, RA {outcome.ra:.1%} ({outcome.description}), routing flipped for {outcome.flip_rate:.1%}")


if __name__ == "__main__":
    main()
