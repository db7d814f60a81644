"""What importing costs and reaches: each case in a process of its own."""

from __future__ import annotations

import importlib
import os
import pickle
import pickletools
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
import torch
from nursery import nursery


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=300,
    )


def printed(code: str, **environment: str) -> str:
    result = run(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


#: What anomalib imports and torch does not need: none of it has a part in the registration.
OTHERS = "import matplotlib.pyplot, pandas, PIL.Image, pyarrow, scipy.stats, sklearn.metrics, sympy"


@pytest.fixture(scope="module")
def before_torch():
    """Processes in which torch is not imported yet."""
    with nursery(OTHERS) as found:
        assert found.printed("import sys; print('torch' in sys.modules)") == "False"
        yield found


@pytest.fixture(scope="module")
def after_torch():
    """Processes in which torch has called the entry point and nothing of anomalib is imported yet."""
    with nursery(f"{OTHERS}, torch, torchvision, lightning.pytorch") as found:
        assert found.printed("import sys; print([m for m in sys.modules if m.startswith('anomalib')])") == "[]"
        yield found


@pytest.fixture(scope="module")
def switched_off():
    """Processes in which anomalib's models are imported and torch calls no entry point."""
    with nursery("import anomalib.models", TORCH_DEVICE_BACKEND_AUTOLOAD="0") as found:
        yield found


def test_the_package_loads_neither_torch_nor_a_host():
    code = """
        import sys, toll_plugin, toll_plugin._autoload
        print([m for m in ("torch", "numpy", "anomalib", "lightning", "pyod", "sklearn") if m in sys.modules])
    """
    assert printed(code) == "[]"


def test_the_core_loads_no_host():
    code = """
        import sys, toll_plugin.core
        print([m for m in ("anomalib", "lightning", "pyod", "torchvision", "sklearn") if m in sys.modules])
    """
    assert printed(code) == "[]"


def test_image_sets_are_read_without_a_host():
    code = """
        import sys, toll_plugin.image_sets, benchmarks.studies.paper
        from torchvision import datasets
        print([m for m in ("anomalib", "lightning", "pyod", "jsonargparse") if m in sys.modules])
    """
    assert printed(code, PYTHONPATH=str(Path(__file__).parents[1])) == "[]"


def test_the_anomalib_adapter_loads_no_pyod(after_torch):
    code = """
        import sys, toll_plugin.anomalib
        print([m for m in ("pyod", "toll_plugin.pyod") if m in sys.modules])
    """
    assert after_torch.printed(code) == "[]"


def test_the_pyod_adapter_loads_no_anomalib():
    code = """
        import sys, toll_plugin.pyod
        others = ("anomalib", "lightning", "torchvision", "toll_plugin.anomalib", "matplotlib.pyplot", "onnx")
        print([m for m in (*others, "dask", "distributed", "pyarrow.dataset", "pyarrow.parquet") if m in sys.modules])
    """
    assert printed(code) == "[]"


def test_the_pyod_adapter_works_where_anomalib_is_not_installed(before_torch):
    code = """
        import sys
        for host in ("anomalib", "lightning", "torchvision"):
            sys.modules[host] = None
        import numpy as np
        from toll_plugin.pyod import TollDetector
        print(TollDetector(max_steps=2).fit(np.eye(5)).decision_scores_.shape)
    """
    assert before_torch.printed(code) == "(5,)"


def test_the_core_works_where_no_host_is_installed():
    code = """
        import sys
        for host in ("anomalib", "lightning", "pyod", "torchvision", "sklearn"):
            sys.modules[host] = None
        import torch
        from toll_plugin.core import ConvAutoencoder, TollLoss, fit
        print(len(fit(ConvAutoencoder(8), torch.rand(8, 1, 8, 8), TollLoss(), max_epochs=1).total))
    """
    assert printed(code) == "1"


@pytest.mark.parametrize(
    "first",
    [
        "import anomalib.models",
        "import anomalib.data, anomalib.models",
        "import anomalib.models.components.base",
        "import anomalib.cli",
        "import toll_plugin.anomalib",
        "import importlib.util; importlib.util.find_spec('anomalib.models'); import anomalib.models",
    ],
)
def test_registered_whatever_is_imported_first(first, before_torch):
    _registered(first, before_torch)


@pytest.mark.parametrize(
    "first", ["import anomalib.models", "import importlib.util; importlib.util.find_spec('anomalib.models.image')"]
)
def test_registered_if_torch_is_imported_first(first, after_torch):
    _registered(first, after_torch)


def _registered(first, processes):
    code = f"""
        import warnings
        warnings.simplefilter("error", RuntimeWarning)
        {first}
        import sys, anomalib.data, anomalib.models
        from anomalib.models import get_model, list_models
        model = get_model({{"class_path": "Toll", "init_args": {{"image_size": 16}}}})
        left = [f for f in sys.meta_path if "toll_plugin" in type(f).__module__]
        print(type(model).__name__, "toll" in list_models(), anomalib.data.DigitsOneVsRest.__name__, left)
        print(type(anomalib.models.image.__spec__.loader).__name__)
    """
    assert processes.printed(code).splitlines() == ["Toll True DigitsOneVsRest []", "SourceFileLoader"]


def test_switched_off_by_torchs_own_variable(switched_off):
    code = """
        import anomalib.models
        print(hasattr(anomalib.models, "Toll"))
        import toll_plugin.anomalib
        print(hasattr(anomalib.models, "Toll"))
    """
    assert switched_off.printed(code).split() == ["False", "True"]


def test_the_dotted_path_works_where_it_is_switched_off(switched_off, tmp_path):
    code = f"""
        from anomalib.cli import AnomalibCLI
        arguments = ["train", "--model", "toll_plugin.anomalib.Toll", "--model.image_size", "16"]
        cli = AnomalibCLI([*arguments, "--data", "MVTecAD", "--default_root_dir", {str(tmp_path)!r}], run=False)
        print(type(cli.model).__name__)
    """
    assert switched_off.printed(code) == "Toll"


@pytest.mark.parametrize("broken", ["raise ImportError('no')", "raise SystemError('worse')"])
def test_a_failing_adapter_is_a_warning_and_breaks_nothing(broken, after_torch):
    code = f"""
        import sys, warnings
        from importlib.abc import Loader, MetaPathFinder
        from importlib.machinery import ModuleSpec

        class Broken(Loader, MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                return ModuleSpec(name, self) if name == "toll_plugin.anomalib" else None
            def create_module(self, spec):
                return None
            def exec_module(self, module):
                {broken}

        sys.meta_path.insert(0, Broken())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch, anomalib.models
        print([w.category.__name__ for w in caught if "toll_plugin" in str(w.message)])
        print(anomalib.models.Padim.__name__)
    """
    assert after_torch.printed(code).splitlines() == ["['RuntimeWarning']", "Padim"]


def test_a_failing_adapter_breaks_nothing_where_warnings_are_errors(before_torch):
    code = """
        import sys
        sys.modules["toll_plugin.core"] = None
        import warnings
        warnings.simplefilter("error", RuntimeWarning)
        import anomalib.models
        print(anomalib.models.Padim.__name__)
    """
    result = before_torch.run(code)
    assert result.stdout.strip() == "Padim"
    assert "toll_plugin could not register" in result.stderr


def test_importing_torch_alone_imports_no_adapter():
    code = """
        import sys, torch
        print([m for m in sys.modules if m.startswith("toll_plugin")])
    """
    assert printed(code) == "['toll_plugin', 'toll_plugin._autoload']"


def test_arming_twice_or_late_is_harmless(after_torch):
    code = """
        import sys, torch
        from toll_plugin._autoload import arm
        arm(); arm()
        print(len([f for f in sys.meta_path if "toll_plugin" in type(f).__module__]))
        import anomalib.models
        arm()
        print(len([f for f in sys.meta_path if "toll_plugin" in type(f).__module__]), hasattr(anomalib.models, "Toll"))
    """
    assert after_torch.printed(code).splitlines() == ["1", "0 True"]


def test_late_arming_registers_what_is_already_imported(switched_off):
    code = """
        import anomalib.models
        from toll_plugin._autoload import arm
        print(hasattr(anomalib.models, "Toll"))
        arm()
        print(hasattr(anomalib.models, "Toll"))
    """
    assert switched_off.printed(code).split() == ["False", "True"]


def test_spawned_processes_know_the_model(tmp_path):
    # A spawned child cannot import a function of `-c`, so the code goes through a file.
    path = tmp_path / "child.py"
    path.write_text(
        textwrap.dedent("""
            import multiprocessing as mp

            def look(queue):
                from anomalib.models import list_models
                queue.put("toll" in list_models())

            if __name__ == "__main__":
                context = mp.get_context("spawn")
                queue = context.Queue()
                child = context.Process(target=look, args=(queue,))
                child.start()
                print(queue.get(timeout=200))
                child.join()
        """)
    )
    result = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout.strip() == "True"


@pytest.mark.parametrize("package", ["toll_plugin.core", "toll_plugin.anomalib", "toll_plugin.pyod"])
def test_public_names_say_where_users_import_them(package):
    module = importlib.import_module(package)
    objects = [getattr(module, name) for name in module.__all__]
    assert {x.__module__ for x in objects if isinstance(x, type | FunctionType)} == {package}


def modules_named_in(pickled: bytes) -> set[str]:
    """Modules of this package that a pickle imports from."""
    strings = {argument for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, str)}
    words = {word for string in strings for word in string.split()}
    return {word for word in words if re.fullmatch(r"toll_plugin(\.\w+)*", word)}


def fitted():
    from toll_plugin.core import ConvAutoencoder, TargetedCollapse, TollLoss, fit
    from toll_plugin.pyod import CollapsedAutoEncoder, TollDetector

    x = np.random.default_rng(0).normal(size=(40, 4))
    network, images = ConvAutoencoder(8), torch.rand(8, 1, 8, 8)
    detector = TollDetector(max_steps=2, n_members=2, hidden_sizes=(4,), latent_dim=2)
    return {
        "TollDetector": detector.fit(x),
        "Explanation": detector.explain(x),
        "CollapsedAutoEncoder": CollapsedAutoEncoder(epoch_num=1, verbose=0, batch_size=8).fit(x),
        "TollLoss": TollLoss(),
        "History": fit(network, images, TollLoss(), max_epochs=1),
        "ConvAutoencoder": network,
        "TargetedCollapse": TargetedCollapse("0"),
    }


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickles_name_public_modules_only(protocol):
    public = {"toll_plugin.core", "toll_plugin.anomalib", "toll_plugin.pyod"}
    deep = {name: modules_named_in(pickle.dumps(made, protocol)) - public for name, made in fitted().items()}
    assert {name: modules for name, modules in deep.items() if modules} == {}
