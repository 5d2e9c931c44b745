"""A model that run.py trained, opened to be looked at: how the tools begin."""

from utils import options, runtime, training


def add_options(parser, cache="auto"):
    """The options --pretrained and --no-cuda, and the section `data`, which the model's own training answers."""
    parser.section("model")
    options.add_model_file(parser)
    parser.switch("--no-cuda", "compute on the CPU even where there is a GPU")
    options.add_data_options(parser, None, cache)


def open_model(parser, argv):
    """The Settings of a tool, the trained model in evaluation mode, and its device.

    The file answers for the model, its data and its loss where nothing is typed. Raises UsageError where what is typed
    contradicts it, RunError where it is missing or damaged.
    """
    typed = parser.typed(argv)
    device = runtime.choose_device(typed.get("no_cuda", False))
    model, file = training.load_model(typed["pretrained"], device)
    values = options.follow_model(parser, file, typed["pretrained"], typed, of_training=("target",))
    return options.Settings(**values), model, device
