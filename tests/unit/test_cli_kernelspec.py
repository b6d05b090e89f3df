"""`jupyter hubgateway kernelspec`: writing kernelspecs for a site, and saying what is wrong with them."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from traitlets.config import Config, Configurable

from hub_gateway._paths import kernelspecs_dir
from hub_gateway.cli.files import Content, contents_of, write_file, write_folder
from hub_gateway.cli.kernelspec import Kernelspec
from hub_gateway.errors import BadRequest, Conflict
from hub_gateway.kernels.speccheck import SpecChecker
from hub_gateway.kernels.specs import KernelSpecs
from hub_gateway.proxies.base import Finding
from hub_gateway.proxies.registry import Proxies
from tests.harness.gateway import ROOT
from tests.unit.test_cli import command


@dataclass(frozen=True)
class Done:
    """What a command said, and how it ended."""

    returncode: object
    stdout: str
    stderr: str


Run = Callable[..., Done]

ARGV = ["python3", "{launchers_dir}/ipykernel_launcher.py", "-f", "{connection_file}"]
GOOD: dict[str, Any] = {"argv": ARGV, "display_name": "Good", "language": "python"}
EG = "enterprise_gateway.services.processproxies"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Where a site keeps its kernelspecs."""
    (tmp_path / "config.py").write_text(
        "c = get_config()\n"
        f"c.KernelSpecManager.kernel_dirs = [{str(tmp_path / 'kernels')!r}]\n"
        "c.KernelSpecManager.ensure_native_kernel = False\n"
        f"c.HubGateway.state_dir = {str(tmp_path / 'state')!r}\n"
        "c.DistributedProxy.hosts = ['node1', 'node2']\n"
        "c.ContainerProxy.allowed_images = ['registry.example.org/*']\n"
    )
    return tmp_path


@pytest.fixture
def run(site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The commands, in this process."""
    for name in [name for name in os.environ if name.startswith(("JUPYTER", "HUB_GATEWAY_"))]:
        monkeypatch.delenv(name)

    def call(what: str, *arguments: str) -> Done:
        made = Kernelspec.subcommands[what][0]()
        made.initialize([f"--config={site / 'config.py'}", *arguments])
        with pytest.raises(SystemExit) as ended:
            made.start()
        return Done(ended.value.code, *capsys.readouterr())

    return call


def findings(document: dict[str, Any], tmp_path: Path, **config: dict[str, Any]) -> list[Finding]:
    parent = Configurable(config=Config(config))
    checker = SpecChecker(KernelSpecs(parent=parent), Proxies(parent=parent, state_dir=str(tmp_path)))
    return list(checker.document(document, "spec", tmp_path))


def stanza(name: str = "local", **config: Any) -> dict[str, Any]:
    return {**GOOD, "metadata": {"process_proxy": {"name": name, "config": config}}}


def options(**found: Any) -> dict[str, Any]:
    return {**GOOD, "metadata": {"hub_gateway": found}}


# -- create, install, list, validate


def test_a_kernelspec_is_made_from_options_alone(run: Run, site: Path) -> None:
    image = "registry.example.org/python:1"
    made = run(
        "create",
        *("--proxy=docker", "--name=big", "--display-name=Big", f"--image={image}", "--cpu=8", "--memory=32G"),
        *("--gpu=1", "--gpu-model=a100", "--max-memory=64G", "--queue=batch", "--env=A=b=c", "--env=D=e"),
        *("--group=ml", "--group=analysts", "--launch-timeout=300", '--proxy-config={"network": "kernels"}'),
    )
    assert made.returncode == 0, made.stderr
    file = site / "kernels" / "big" / "kernel.json"
    assert made.stdout.strip() == str(file)
    assert json.loads(file.read_text()) == {
        "display_name": "Big",
        "language": "python",
        "argv": ARGV,
        "interrupt_mode": "signal",
        "env": {"A": "b=c", "D": "e"},
        "metadata": {
            "debugger": True,
            "process_proxy": {"name": "docker", "config": {"image_name": image, "network": "kernels"}},
            "hub_gateway": {
                "resources": {"cpu": 8, "memory": "32G", "gpu": 1, "gpu_model": "a100", "queue": "batch"},
                "resources_max": {"memory": "64G"},
                "launch_timeout": 300,
                "groups": ["ml", "analysts"],
            },
        },
    }
    again = run("create", "--proxy=docker", "--name=big", f"--image={image}")
    assert again.returncode == 1 and "--replace" in again.stderr
    assert json.loads(file.read_text())["display_name"] == "Big"
    assert run("create", "--proxy=docker", "--name=big", f"--image={image}", "--replace").returncode == 0
    assert json.loads(file.read_text())["display_name"] != "Big"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--proxy=docker", "--image=evil/image"), "may not run here"),
        (("--proxy=distributed", "--hosts=node1,node9"), "no host node9"),
        (("--name=My Kernel",), "no name for a kernelspec"),
        (("--name=.", "--replace"), "no name for a kernelspec"),
        (("--name=..", "--replace"), "no name for a kernelspec"),
        (("--image=registry.example.org/x",), "not for kernels of local"),
        (("--proxy=mars",), "no sample"),
        (("--memory=much",), "memory"),
        (("--cpu=4", "--max-cpu=2"), "ascend"),
        (("--env=A",), "NAME=VALUE"),
        (("--user", "--prefix=/x"), "two places"),
        (("--proxy-config=[]",), "no JSON object"),
        (("stray",), "--name"),
    ],
)
def test_what_would_be_wrong_is_not_written(run: Run, site: Path, arguments: tuple[str, ...], said: str) -> None:
    (site / "kernel.json").write_text("{}")
    done = run("create", *arguments)
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert not list((site / "kernels").rglob("*")) and (site / "config.py").is_file()


def test_from_a_sample_to_the_list(run: Run, site: Path) -> None:
    assert run("create", "--proxy=distributed", "--hosts=node1, node2", "--cpu=2").returncode == 0
    profiles = site / "profiles.json"
    profiles.write_text(
        json.dumps([{"name": "large", "resources": {"cpu": 8}, "groups": ["ml"]}, {"name": "x", "sizes": 1}])
    )
    refused = run("create", "--name=sizes", "--cpu=1", "--memory=1G", f"--profiles={profiles}")
    assert refused.returncode == 1 and "sizes--x" in refused.stderr
    # Written by hand, the good one is offered all the same.
    (site / "by-hand" / "sizes").mkdir(parents=True)
    document = {**GOOD, "metadata": {"hub_gateway": {"resources": {"cpu": 1, "memory": "1G"}}}}
    document["metadata"]["hub_gateway"]["profiles"] = json.loads(profiles.read_text())
    (site / "by-hand" / "sizes" / "kernel.json").write_text(json.dumps(document))
    (site / "by-hand" / "sizes" / "logo-svg.svg").write_text("<svg/>")
    assert run("validate", str(site / "by-hand" / "sizes")).returncode == 1
    folder = site / "kernels" / "sizes"
    folder.mkdir()
    for file in (site / "by-hand" / "sizes").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    table = run("list").stdout.splitlines()
    assert [row.split()[0] for row in table] == ["kernelspec", "python_distributed", "sizes", "sizes--large", "error"]
    assert table[3].split()[-5:] == ["8", "1", "GiB", "-", "group"] or "group ml" in table[3]
    assert "sizes--x" in table[4] and "sizes" in table[4]
    found = json.loads(run("list", "--json").stdout)
    large = next(one for one in found["kernelspecs"] if one["profile"] == "large")
    assert (large["name"], large["kernelspec"], large["groups"]) == ("sizes--large", "sizes", ["ml"])
    assert large["resources"]["cpu"] == 8 and large["proxy"] == "local" and list(found["broken"]) == ["sizes--x"]
    every = run("validate")
    assert every.returncode == 1 and "error   sizes--x" in every.stdout and "ok      python_distributed" in every.stdout
    assert run("validate", "python_distributed").returncode == 0
    assert "installed: python_distributed, sizes" in run("validate", "nonsense").stderr


def test_a_folder_is_installed_with_its_files(run: Run, site: Path) -> None:
    done = run("install", "python_local", f"--prefix={site / 'env'}")
    target = site / "env" / "share" / "jupyter" / "kernels" / "python_local"
    assert done.returncode == 0 and "does not look there" in done.stderr
    assert (target / "kernel.json").read_bytes() == (kernelspecs_dir() / "python_local" / "kernel.json").read_bytes()
    (target / "logo-64x64.png").write_bytes(b"png")
    assert run("install", str(target), "--name=ours").returncode == 0
    assert (site / "kernels" / "ours" / "logo-64x64.png").read_bytes() == b"png"
    assert run("install", str(target), "--name=ours").returncode == 1
    (site / "R_Local").mkdir()
    (site / "R_Local" / "kernel.json").write_text(json.dumps({**GOOD, "language": "R"}))
    assert run("validate", str(site / "R_Local")).returncode == 0
    assert run("install", str(site / "R_Local")).returncode == 0 and (site / "kernels" / "r_local").is_dir()
    nothing = run("install", "nothing")
    assert nothing.returncode == 1 and "python_docker" in nothing.stderr, "it names the samples"
    (target / "kernel.json").write_text("{")
    broken = run("install", str(target), "--name=ours", "--replace")
    assert broken.returncode == 1 and "line 1" in broken.stderr
    assert json.loads((site / "kernels" / "ours" / "kernel.json").read_text())["language"] == "python"


def test_it_is_said_where_a_kernelspec_is_not_offered(run: Run, site: Path) -> None:
    """And not where one of its profiles is."""
    with (site / "config.py").open("a") as file:
        file.write("c.KernelSpecs.allowed_kernelspecs = ['a--b--large']\n")
    (site / "profiles.json").write_text(json.dumps([{"name": "large"}]))
    for name, said in (("a", True), ("a--b", False)):
        made = run("create", f"--name={name}", f"--profiles={site / 'profiles.json'}")
        assert made.returncode == 0 and ("not offered" in made.stderr) is said, made.stderr
        assert ("not offered" in run("validate", name).stdout) is said
    checked = run("validate", "a--b--large")
    assert checked.returncode == 0 and "a--b" in checked.stdout
    assert [one["name"] for one in json.loads(run("list", "--json").stdout)["kernelspecs"]] == ["a--b--large"]


def test_as_an_administrator_calls_it(site: Path) -> None:
    option = f"--config={site / 'config.py'}"
    assert command("kernelspec", "install", "python_local", option).returncode == 0
    listed = command("kernelspec", "list", option)
    assert listed.returncode == 0 and "everybody" in listed.stdout and not listed.stderr
    (site / "kernels" / "python_local" / "kernel.json").write_text("{")
    listed = command("kernelspec", "list", option)
    assert "line 1" in listed.stdout and not listed.stderr, "no traceback, nothing twice"
    assert command("kernelspec").returncode == 2


def test_a_profile_whose_name_a_folder_has(run: Run, site: Path) -> None:
    """Also one that cannot be read: `validate` and `list` say so, and the profile is not used in its place."""
    for name, text in (("k", json.dumps(options(profiles=[{"name": "p"}]))), ("k--p", "{")):
        (site / "kernels" / name).mkdir(parents=True)
        (site / "kernels" / name / "kernel.json").write_text(text)
    done = run("validate", "k")
    assert done.returncode == 1 and "error   k--p: profile: A folder" in done.stdout
    found = json.loads(run("list", "--json").stdout)
    assert [one["name"] for one in found["kernelspecs"]] == ["k"] and "A folder" in found["broken"]["k--p"]


# -- files


def test_a_folder_that_is_replaced_is_never_without_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "spec"
    first = {"kernel.json": Content(b"1"), "logo.png": Content(b"x"), "bin/run.sh": Content(b"y", 0o755)}
    write_folder(folder, first, last="kernel.json", replace=False)
    assert contents_of(folder) == first
    with pytest.raises(Conflict):
        write_folder(folder, {"kernel.json": Content(b"2")}, last="kernel.json", replace=False)
    write_folder(folder, {"kernel.json": Content(b"2")}, last="kernel.json", replace=True)
    assert [path.name for path in folder.iterdir()] == ["kernel.json"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(Conflict, match="left alone"):
        write_folder(tmp_path / "home", first, last="kernel.json", replace=True)
    with pytest.raises(BadRequest, match="cannot be written"):
        write_folder(folder / "kernel.json" / "x", first, last="kernel.json", replace=False)


def test_what_is_written_can_be_read_by_the_gateway(tmp_path: Path) -> None:
    """Whatever the umask of who writes it: the gateway is another account."""
    files = {"kernel.json": Content(b"1"), "bin/deep/run.sh": Content(b"y", 0o755)}
    before = os.umask(0o077)
    try:
        write_folder(tmp_path / "share" / "kernels" / "spec", files, last="kernel.json", replace=False)
        write_file(tmp_path / "token", b"t", 0o600)
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes.pop("token") == 0o600 and modes.pop("share/kernels/spec/kernel.json") == 0o644
    assert len(modes) == 6 and set(modes.values()) == {0o755}


def test_half_a_folder_is_taken_back(tmp_path: Path) -> None:
    odd = {"a": Content(b"x"), "a/b": Content(b"y"), "kernel.json": Content(b"1")}
    with pytest.raises(BadRequest):
        write_folder(tmp_path / "spec", odd, last="kernel.json", replace=False)
    assert not (tmp_path / "spec").exists()


def test_links_out_of_a_folder_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "spec"
    folder.mkdir()
    (folder / "secret").symlink_to("/etc/passwd")
    with pytest.raises(BadRequest, match="link"):
        contents_of(folder)


def test_links_to_folders(tmp_path: Path) -> None:
    """What is behind one is not left out without a word; and nothing is written through one."""
    source, target, elsewhere = (tmp_path / name for name in ("source", "target", "elsewhere"))
    (source / "real").mkdir(parents=True)
    (source / "real" / "file").write_text("x")
    (source / "link").symlink_to("real")
    with pytest.raises(BadRequest, match="which is no file"):
        contents_of(source)
    (source / "link").unlink()
    target.mkdir()
    elsewhere.mkdir()
    (target / "kernel.json").write_text("{}")
    (target / "real").symlink_to(elsewhere)
    files = {**contents_of(source), "kernel.json": Content(b"1")}
    write_folder(target, files, last="kernel.json", replace=True)
    assert contents_of(target) == files and not (target / "real").is_symlink()
    assert list(elsewhere.iterdir()) == []


# -- what is wrong


@pytest.mark.parametrize("name", sorted(path.parent.name for path in kernelspecs_dir().glob("*/kernel.json")))
def test_the_samples_are_as_they_should_be(name: str, tmp_path: Path) -> None:
    checker = SpecChecker(KernelSpecs(), Proxies(state_dir=str(tmp_path)))
    assert [f for f in checker.directory(kernelspecs_dir() / name, name) if f.level == "error"] == []


@pytest.mark.parametrize(
    ("document", "level", "words"),
    [
        ({**GOOD, "argv": "python3"}, "error", "argv"),
        ({**GOOD, "argv": []}, "error", "argv"),
        ({**GOOD, "argv": ["python3", "-m", "ipykernel"]}, "error", "connection_file"),
        ({**GOOD, "argv": ["x", "{response_address}"]}, "error", "Enterprise Gateway"),
        ({**GOOD, "argv": ["python3", "{launchers_dir}/none.py", "{connection_file}"]}, "error", "no file"),
        ({**GOOD, "argv": ["/no/such/program", "{connection_file}"]}, "warning", "not on this machine"),
        ({**GOOD, "argv": [*ARGV, "{conection_file}"]}, "warning", "nothing fills in"),
        ({**GOOD, "env": {"A": 1}}, "error", "no string"),
        ({**GOOD, "env": {"A-B": "1"}}, "error", "no name"),
        ({**GOOD, "interrupt_mode": "shout"}, "error", "interrupt_mode"),
        ({**GOOD, "metadata": []}, "error", "metadata"),
        ({**GOOD, "metdata": {}}, "warning", "no such field"),
        ({"argv": ARGV}, "warning", "display_name"),
        (stanza("mars"), "error", "mars"),
        ({**GOOD, "metadata": {"process_proxy": {"class_name": f"{EG}.mars.MarsProxy"}}}, "error", "MarsProxy"),
        (stanza(image_name="x"), "warning", "local does not heed it"),
        (stanza(image_nam="x"), "error", "no such key"),
        (stanza(authorized_users=3), "error", "names"),
        (stanza("docker", image_name=3), "error", "must be a text"),
        (stanza("docker"), "error", "names no image"),
        (stanza("docker", image_name="x", network="host"), "error", "network"),
        (stanza("docker", image_name="x", volumes=["/"]), "error", "source"),
        (stanza("docker", image_name="x", volumes=[{"source": "/", "target": "/h"}]), "error", "may not have /"),
        (stanza("docker-swarm", image_name="x", constraints="a"), "error", "list of texts"),
        (stanza("docker", image_name="x", constraints=["a"]), "error", "no such key"),
        (stanza("distributed", remote_hosts="a,b"), "warning", "no hosts yet"),
        (stanza("distributed", port_range="1-2"), "error", "range of ports"),
        (options(resources={"cpu": "many"}), "error", "cpu"),
        (options(resources={"cores": 1}), "error", "cores"),
        (options(resources={"cpu": 4}, resources_max={"cpu": 2}), "error", "ascend"),
        (options(cull_idle_timeout="1h"), "error", "seconds"),
        (options(launch_timeout=-1), "error", "launch_timeout"),
        (options(transport="pigeon"), "error", "pigeon"),
        (options(groups=[]), "error", "nobody"),
        (options(recources={}), "warning", "no such option"),
        (options(profiles=[{"name": "A"}]), "error", "lower-case"),
        (options(profiles=[{"name": "a", "resources": {"gpu": 0.5}}]), "error", "whole number"),
        (options(profiles=[{"name": "a", "config": {"odd": 1}}]), "error", "no such key"),
    ],
)
def test_what_is_wrong_is_said(document: dict[str, Any], level: str, words: str, tmp_path: Path) -> None:
    found = findings(document, tmp_path)
    assert any(f.level == level and words in f"{f.what}: {f.message}" for f in found), found
    assert all(f.hint and f.what.startswith("spec") for f in found)


def test_profiles_are_held_against_the_allowed_images(tmp_path: Path) -> None:
    document = stanza("docker", image_name="good/x")
    document["metadata"]["hub_gateway"] = {"profiles": [{"name": "bad", "image": "evil/x"}, {"name": "fine"}]}
    (found,) = findings(document, tmp_path, DockerProxy={"allowed_images": ["good/*"]})
    assert found.level == "error" and found.what.startswith("spec--bad") and "evil/x" in found.message


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        (f"{EG}.processproxy.LocalProcessProxy", {"authorized_users": "a,b"}),
        (f"{EG}.distributed.DistributedProcessProxy", {"remote_hosts": "node1,node2", "port_range": "40000..41000"}),
        (f"{EG}.docker_swarm.DockerProcessProxy", {"image_name": "elyra/kernel-py:3.2.3"}),
        (f"{EG}.docker_swarm.DockerSwarmProcessProxy", {"image_name": "elyra/kernel-py:3.2.3"}),
    ],
)
def test_enterprise_gateways_names_are_understood(class_name: str, config: dict[str, Any], tmp_path: Path) -> None:
    document = {**GOOD, "metadata": {"process_proxy": {"class_name": class_name, "config": config}}}
    assert findings(document, tmp_path, DistributedProxy={"hosts": ["node1", "node2"]}) == []


# -- the guide


def test_the_guide_does_what_it_says(run: Run, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands are run in order; its example is a kernelspec with three entries."""
    page = (ROOT / "docs" / "howto" / "kernelspecs.md").read_text()
    folder = site / "my_kernel"
    folder.mkdir()
    (folder / "kernel.json").write_text(json.dumps(GOOD))
    monkeypatch.chdir(site)
    commands = [
        shlex.split(text) for text in re.findall(r"^\$ jupyter hubgateway kernelspec (.*)$", page, re.MULTILINE)
    ]
    assert {what for what, *_ in commands} == {"create", "install", "list", "validate"}
    for what, *arguments in commands:
        done = run(what, *arguments)
        assert done.returncode == 0, (what, arguments, done.stderr)
    made = {path.name for path in (site / "kernels").iterdir()}
    assert made == {"python_docker", "python_distributed", "python_local", "python_ours"}
    (example,) = (json.loads(text) for text in re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    (site / "kernels" / "python_docker" / "kernel.json").write_text(json.dumps(example))
    assert run("validate", "python_docker").returncode == 0
    offered = json.loads(run("list", "--json").stdout)["kernelspecs"]
    shown = {one["name"]: one["display_name"] for one in offered if one["kernelspec"] == "python_docker"}
    assert shown == {
        "python_docker": "Python on Docker",
        "python_docker--large": "Python on Docker (large)",
        "python_docker--gpu": "Python with CUDA",
    }
