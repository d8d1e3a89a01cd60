"""PARA with vLLM's OpenAI server: the model name selects the tenant, and refused requests get HTTP 400."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from integration_tests.helpers.bad_folders import BAD_FOLDERS
from integration_tests.helpers.processes import environment
from integration_tests.vllm_engine.para_engines import TENANTS, Job, Tenants, make_base, make_jobs, make_tenants


openai = pytest.importorskip("openai")  # installed with vLLM
pytestmark = pytest.mark.vllm

START_SECONDS = 240
BASE_NAME = "base"


class Server:
    """vLLM's OpenAI server in a separate process."""

    def __init__(self, tenants: Tenants, log: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tenants.base)]
        command += ["--served-model-name", BASE_NAME, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init", "--max-model-len", "128"]
        command += ["--max-num-seqs", "8", "--kv-cache-memory-bytes", str(2**24), "--max-num-batched-tokens", "128"]
        command += ["--enable-lora", "--max-loras", "8", "--additional-config", '{"para": {}}', *arguments]
        variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}
        variables["PYTHONPROFILEIMPORTTIME"] = "1"  # all processes log their imports
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment(**variables), start_new_session=True
            )
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.client.models.list()
                return
            except openai.OpenAIError:
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(self.log.read_text()[-4000:])

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def complete(self, job: Job, model: str | None = None, **options: Any) -> list[int]:
        """Returns the tokens of the server's answer to a job."""
        extra = {"ignore_eos": True, "return_token_ids": True, **options.pop("extra", {})}
        done = self.client.completions.create(
            model=model or job.tenant or BASE_NAME,
            prompt=job.prompt,
            max_tokens=len(job.answer),
            temperature=0,
            extra_body=extra,
            **options,
        )
        return done.choices[0].token_ids

    def post(self, path: str, **content: Any) -> tuple[int, str]:
        """Returns the status and the body of the response to a POST request."""
        request = Request(
            f"http://127.0.0.1:{self.port}/v1/{path}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    base = make_base(tmp_path_factory.mktemp("base"))
    return make_tenants(base, tmp_path_factory.mktemp("tenants"))


@pytest.fixture(scope="module")
def server(tenants: Tenants, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    modules = [f"{name}={folder}" for name, folder in tenants.folders.items() if name != "mean"]
    started = Server(tenants, tmp_path_factory.mktemp("log") / "server.txt", "--lora-modules", *modules)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def jobs(tenants: Tenants) -> list[Job]:
    return [job for job in make_jobs(tenants, 45, new_tokens=8, seed=21) if job.tenant != "mean"]


def test_the_model_name_chooses_the_tenant(server: Server, jobs: list[Job]) -> None:
    with ThreadPoolExecutor(12) as clients:
        assert list(clients.map(server.complete, jobs)) == [job.answer for job in jobs]
    names = {model.id for model in server.client.models.list()}
    assert names == {BASE_NAME, *TENANTS} - {"mean"}


def test_no_process_imports_peft(server: Server, jobs: list[Job]) -> None:
    assert server.complete(jobs[0]) == jobs[0].answer
    imported = re.findall(r"import time: .*\| +([\w.]+)$", server.log.read_text(), re.MULTILINE)
    assert imported.count("peft_fanlora.para.core.generator") == 2  # by the server and the engine
    assert not [name for name in imported if name.startswith(("peft.", "transformers.trainer"))]


def test_tenants_are_loaded_and_unloaded(server: Server, tenants: Tenants) -> None:
    first, second = (tenants.job(name, [9, 8, 7, 6, 5], 8) for name in ("mean", "max"))
    with pytest.raises(openai.NotFoundError):
        server.complete(first, model="guest")
    for job in (first, second):
        assert (
            server.post("load_lora_adapter", lora_name="guest", lora_path=str(tenants.folders[job.tenant]))[0] == 200
        )
        assert server.complete(job, model="guest") == job.answer
        assert server.post("unload_lora_adapter", lora_name="guest")[0] == 200
    for job in (first, second):
        status, _ = server.post(
            "load_lora_adapter", lora_name="guest", lora_path=str(tenants.folders[job.tenant]), load_inplace=True
        )
        assert status == 200
        assert server.complete(job, model="guest") == job.answer
    server.post("unload_lora_adapter", lora_name="guest")


def test_answers_are_streamed(server: Server, jobs: list[Job]) -> None:
    job = next(job for job in jobs if job.tenant == "attention")
    stream = server.client.completions.create(
        model=job.tenant,
        prompt=job.prompt,
        max_tokens=len(job.answer),
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    tokens = [token for chunk in stream for choice in chunk.choices for token in choice.token_ids or ()]
    assert tokens == job.answer


@pytest.mark.parametrize("name", [name for index, name in enumerate(BAD_FOLDERS) if index % 3 == 0])
def test_a_bad_folder_gets_400(name: str, server: Server, tenants: Tenants, jobs: list[Job], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tenants.folders["attention"], tmp_path / "tenant"))
    BAD_FOLDERS[name][0](folder)
    status, text = server.post("load_lora_adapter", lora_name="bad", lora_path=str(folder))
    assert status == 400
    assert "The adapter 'bad' cannot be served" in text
    assert server.complete(jobs[0]) == jobs[0].answer


def test_bad_requests_get_400(server: Server, tenants: Tenants, jobs: list[Job]) -> None:
    beams = {"use_beam_search": True}
    for options, message in (
        ({"n": 2, "extra": beams}, "use n for"),
        ({"extra": {"truncate_prompt_tokens": -5}}, "truncate_prompt_tokens"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            server.complete(jobs[0], model="attention", **options)
        assert server.complete(jobs[0]) == jobs[0].answer


def test_a_folder_that_vanishes_while_it_is_served(
    server: Server, tenants: Tenants, jobs: list[Job], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tenants.folders["attention"], tmp_path / "tenant"))
    assert server.post("load_lora_adapter", lora_name="passing", lora_path=str(folder))[0] == 200
    shutil.rmtree(folder)
    with pytest.raises(openai.BadRequestError, match="passing"):
        server.complete(jobs[0], model="passing")
    assert server.complete(jobs[0]) == jobs[0].answer
