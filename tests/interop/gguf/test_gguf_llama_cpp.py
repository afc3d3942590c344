"""Log-probabilities of llama.cpp itself against ours, for the files its converter wrote."""

import http.client
import json
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
import xllamacpp

from engine.model_sources.load_model import load_model

pytestmark = pytest.mark.interop
FIXTURES = Path(__file__).parents[2] / "fixtures" / "gguf"
FAMILIES = sorted(path.stem for path in FIXTURES.glob("*.gguf"))


def most_likely(path: Path, prompts: list[list[int]]) -> list[dict[int, float]]:
    """llama.cpp's log-probability of each of the eight most likely tokens after every prompt."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    address = urlparse(server.listening_address)
    connection = http.client.HTTPConnection(str(address.hostname), address.port)
    likely = []
    for ids in prompts:
        body = {"prompt": ids, "n_predict": 1, "n_probs": 8, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/completion", json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
        # A stop token leaves no text, and the server then tells no probabilities.
        steps = answer.get("completion_probabilities", [])
        likely.append({t["id"]: t["logprob"] for step in steps for t in step["top_logprobs"]})
    connection.close()
    del server
    return likely


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_equal_those_of_llama_cpp(family: str) -> None:
    path = FIXTURES / f"{family}.gguf"
    model = load_model(path)
    generator = torch.Generator().manual_seed(5)
    lengths = range(2, 120, 6)
    prompts = [torch.randint(4, 64, (n,), generator=generator).tolist() for n in lengths]
    answers = most_likely(path, prompts)
    assert sum(1 for answer in answers if answer) >= 15
    for ids, answer in zip(prompts, answers, strict=True):
        ours = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        for token, theirs in answer.items():
            # Both read F16 weights; llama.cpp computes with F16 activations and cache as well.
            assert float(ours[token]) == pytest.approx(theirs, abs=0.1), (len(ids), token)
