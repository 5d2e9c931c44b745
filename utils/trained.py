"""A model that run.py trained, opened to be looked at: how the tools begin."""

import modules
from utils import options, runtime, training
from utils.runtime import RunError

OF_TRAINING = ("beta_a", "beta_v", "target", "recon_mask", "hide", "grey")  # options of run.py that tools may need


def add_options(parser):
    """The options --pretrained and --no-cuda, and the section `data`, which the model's own training answers."""
    parser.section("model")
    parser.option("--pretrained", options.model_file, None, "FILE", "a model.pt of run.py, or the folder of its run",
                  required=True)
    parser.switch("--no-cuda", "compute on the CPU even where there is a GPU")
    options.add_data_options(parser, of_model=True)


def open_model(parser, argv):
    """The Settings of a tool, the trained model in evaluation mode, and its device.

    The file answers for the model, its data and its loss where nothing is typed. Raises UsageError where what is typed
    contradicts it, RunError where it is missing or damaged.
    """
    typed = parser.typed(argv)
    device = runtime.choose_device(typed.get("no_cuda", False))
    model, file = load_model(typed["pretrained"], device)
    saved = {**options.described(file), **options.data_of(file, typed, OF_TRAINING)}
    defaults = {**parser.defaults, "data_folder": "./data"}
    values = options.merge(defaults, saved, typed, options.DESCRIBED, typed["pretrained"])
    options.check_channels(values["dataset"], file["options"], typed["pretrained"])
    return options.Settings(**values), model, device


def load_model(path, device="cpu"):
    """The trained model in the file `path`, in evaluation mode on `device`, and all that the file holds: a dict.

    Raises RunError where the file is missing or damaged.
    """
    file = training.load(path, training.MODEL)
    try:
        model = modules.build_model(file["options"])
        model.load_state_dict(file["model"])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:  # of the right kind, with the wrong content
        reason = str(error).splitlines()[0]
        raise RunError(f"{path}: its weights and its options do not fit ({reason}); train the model again") from None
    return model.to(device).eval(), file
