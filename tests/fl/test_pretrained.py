"""Networks of torchvision and transformers as the base of a federated run, held against the libraries themselves."""

import shutil

import datasets
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from test_run import Watcher, rows_of
from tokenizers import Tokenizer, models, pre_tokenizers
from torchvision.models import mobilenet_v3_small

from lowrank_core import LowrankError, UsageError
from lowrank_fl.clients import examples_of, model_of
from lowrank_fl.infer import load_classifier
from lowrank_fl.load import load_config
from lowrank_fl.plan import plan
from lowrank_fl.run import resume, run
from lowrank_fl.state import state_of, transferred

pytestmark = pytest.mark.usefixtures("quick")

SMALL = ["sweep={}", "rounds=1", "federation.clients=4", "federation.clients_per_round=2", "federation.epochs=1"]
SMALL += ["data.max_examples=60", "data.max_test_examples=20", "partition.kind=iid", "engine.workers=1"]
WORDS = ["[PAD]", "[UNK]", *"good fine great bad poor awful film play song".split()]


def config(folder, *more):
    return load_config("quickstart", [*SMALL, f"model.name={folder}", "model.method=original", "adapter.rank=2", *more])


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder with a vision transformer of 8x8 pixels and five classes, as transformers saves it."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    made = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    transformers.ViTForImageClassification(made).save_pretrained(folder)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    size = {"height": 8, "width": 8}
    # Newer versions name the processor that needs no torchvision apart.
    processor = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    processor(image_mean=mean, image_std=std, size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a BERT of eleven words, and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    made = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertForSequenceClassification(made).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A folder with texts that praise (1) or do not (0)."""
    folder = tmp_path_factory.mktemp("reviews")
    texts = [f"{subject} {word}" + " song" * (number % 3) for number in range(8) for subject in ("film", "play")
             for word in WORDS[2:8]]  # fmt: skip
    labels = [int(text.split()[1] in ("good", "fine", "great")) for text in texts]
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for split in ("train", "test"):
        made = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=kinds)
        made.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def of_texts(bert, reviews, *more):
    given = [f"data.path={reviews}", "data.name=reviews", "data.text_key=text", "data.max_examples=null"]
    return config(bert, "adapter.method=loha", *given, *more)


@pytest.mark.slow
def test_a_vision_transformer_reads_pictures_as_transformers_prepares_them(vit):
    settings = config(vit, "adapter.method=lora")
    examples = examples_of(settings)
    model, _ = model_of(settings, examples)
    peer = transformers.ViTForImageClassification.from_pretrained(vit)
    processor = transformers.AutoImageProcessor.from_pretrained(vit)
    pictures = examples.inputs[:4].expand(-1, 3, -1, -1)
    ready = processor(list(pictures), return_tensors="pt", do_resize=False, rescale_factor=1 / examples.white)
    given = model.network.vit(examples.normalize(examples.inputs[:4]).expand(-1, 3, -1, -1)).last_hidden_state
    assert model.network.classifier.weight.shape == (10, 16)
    # Grey has one mean of the three, so the pictures are held against each other channel by channel.
    values = ready["pixel_values"]
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    raw = values * std[:, None, None] + mean[:, None, None]
    wanted = peer.vit((raw - 0.5) / 0.3).last_hidden_state
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*`r` is not used in AdaLora")
@pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match")
@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "adalora"])
def test_peft_puts_the_adapter_on_the_librarys_own_network(method, vit, tmp_path):
    given = ["rounds=2", "adapter.settle=0"] if method == "adalora" else []
    settings = config(vit, f"adapter.method={method}", "federation.lr=0.05", *given)
    run(settings, tmp_path / "run", Watcher())
    ranks = rows_of(tmp_path / "run")[-1]["layer_ranks"]
    assert ranks.keys() == ({entry.name for entry in plan(settings).runs[0].layers} if given else set())
    assert sum(ranks.values()) == len(ranks)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    network = transformers.ViTForImageClassification.from_pretrained(vit, num_labels=10, ignore_mismatched_sizes=True)
    kernel = "vit.embeddings.patch_embeddings.projection"
    assert torch.equal(saved[f"network.{kernel}.base.weight"], network.state_dict()[f"{kernel}.weight"])
    peer = PeftModel.from_pretrained(network, tmp_path / "run" / "adapter").eval()
    classifier = load_classifier(tmp_path / "run")
    pictures = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(
        classifier(pictures), peer(pixel_values=pictures.expand(-1, 3, -1, -1)).logits.softmax(1), atol=1e-5, rtol=1e-4
    )


@pytest.mark.slow
def test_only_the_adapter_norms_and_the_last_layer_travel(vit, tmp_path):
    settings = config(vit, "adapter.method=lora")
    model, report = model_of(settings, examples_of(settings))
    sent = transferred(model)
    assert {name for name in sent if ".adapters." not in name and "norm" not in name} == {
        "network.classifier.weight", "network.classifier.bias"
    }  # fmt: skip
    assert report is not None
    assert all(not entry.name.startswith("network.") for entry in report.changed)
    (planned,) = plan(settings).runs
    (summary,) = run(settings, tmp_path / "run", Watcher())
    assert planned.transferred_params == summary.transferred_params == sum(tensor.numel() for tensor in sent.values())
    assert planned.total_bytes == pytest.approx(summary.total_bytes, rel=0.01)


@pytest.mark.slow
def test_a_text_classifier_learns_from_texts(bert, reviews, tmp_path):
    given = ["rounds=3", "federation.clients=2", "federation.epochs=8", "federation.batch_size=8"]
    given += ["federation.lr=0.05", "federation.momentum=0.9"]
    settings = of_texts(bert, reviews, *given)
    (summary,) = run(settings, tmp_path / "run", Watcher())
    assert summary.accuracy > 0.8
    with pytest.raises(LowrankError, match="is a model of text"):
        load_classifier(tmp_path / "run")


@pytest.mark.slow
def test_padding_is_not_attended_to(bert, reviews):
    settings = of_texts(bert, reviews)
    examples = examples_of(settings)
    assert examples.inputs.dtype == torch.int32
    model, _ = model_of(settings, examples)
    model.eval()
    short = next(row for row in examples.inputs if row[2] == 0)
    logits = model(examples.normalize(short[None]))
    torch.testing.assert_close(logits, model(examples.normalize(short[None, :2])))
    peer = transformers.BertForSequenceClassification.from_pretrained(bert)
    torch.testing.assert_close(logits, peer(input_ids=short[None, :2].long()).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_run_on_texts_that_was_stopped_ends_with_the_same_bits(bert, reviews, tmp_path):
    run(of_texts(bert, reviews, "rounds=2"), tmp_path / "whole", Watcher())
    run(of_texts(bert, reviews, "rounds=1"), tmp_path / "parts", Watcher())
    resume(tmp_path / "parts", Watcher(), ["rounds=2"])
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert len(rows_of(tmp_path / "parts")) == 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torchvision's cache with weights of its smallest network, and nothing else to be had."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    weights = mobilenet_v3_small(weights=None).state_dict()
    torch.save(weights, folder / "mobilenet_v3_small-047dcff4.pth")

    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    return weights


@pytest.mark.slow
def test_torchvisions_weights_are_kept_but_for_the_last_layer(hub):
    settings = config("torchvision:mobilenet_v3_small", "adapter.method=lora", "model.pixels=32")
    model, _ = model_of(settings, examples_of(settings))
    assert torch.equal(model.network.features[0][0].base.weight, hub["features.0.0.weight"])
    assert model.network.classifier[3].weight.shape == (10, 1024)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    again, _ = model_of(settings, examples_of(settings))
    assert torch.equal(model.network.classifier[3].weight, again.network.classifier[3].weight)


@pytest.mark.slow
def test_weights_that_cannot_be_fetched(hub):
    settings = config("torchvision:resnet18")
    with pytest.raises(LowrankError) as caught:
        model_of(settings, examples_of(settings))
    assert str(caught.value) == (
        "torchvision's weights of resnet18 cannot be had (no network); fetch them where there is a network, or draw "
        "them with -o model.pretrained=false"
    )


@pytest.mark.slow
def test_torchvisions_networks_can_be_factorized_if_they_are_drawn():
    settings = config(
        "torchvision:mobilenet_v3_small", "model.pretrained=false", "model.method=fedpara", "model.gamma=0.3"
    )
    model, report = model_of(settings, examples_of(settings))
    assert report is not None
    assert report.params < report.original_params
    assert {entry.name: entry.reason for entry in report.left}["network.classifier.3"] == "excluded"
    assert not any(name.startswith("network.classifier.3.weight.") for name in state_of(model))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["model.name=cn"], "model.name: is cnn, mlp, vgg16, resnet18, lstm, torchvision:NAME, or a folder that"),
        (["model.name=mpl"], "nearest: mlp"),
        (
            ["model.name=torchvision:resnet18", "model.method=fedpara"],
            "method fedpara draws factors in place of the weights that torchvision:resnet18 brings",
        ),
    ],
)
def test_a_network_that_cannot_be(given, said):
    with pytest.raises(UsageError) as caught:
        load_config("quickstart", [*SMALL, *given])
    assert said in str(caught.value)


@pytest.mark.slow
def test_folders_and_names_that_mean_no_network(tmp_path, vit, bert):
    for name, said in (
        (tmp_path, "there is no config.json in it"),
        ("torchvision:resnet81", "torchvision has no model 'resnet81'; the nearest names are resnet18"),
        (bert, "cannot be used as model.name"),
    ):
        settings = config(name)
        with pytest.raises(LowrankError, match=said):
            model_of(settings, examples_of(config("cnn")))
    broken = tmp_path / "broken"
    shutil.copytree(vit, broken)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(LowrankError, match="cannot be used as"):
        model_of(config(broken), examples_of(config("cnn")))


def test_texts_need_a_network_that_reads_them(bert, reviews, vit):
    with pytest.raises(UsageError) as caught:
        examples_of(of_texts("cnn", reviews))
    assert str(caught.value) == (
        "data.text_key is 'text', and model.name cnn does not read tokens; give a folder with a classifier of texts as "
        "transformers saves it"
    )
    with pytest.raises(UsageError, match="names 'label', which holds no texts"):
        examples_of(of_texts(bert, reviews, "data.text_key=label"))
    with pytest.raises(LowrankError, match="cannot be used"):
        examples_of(of_texts(vit, reviews))
