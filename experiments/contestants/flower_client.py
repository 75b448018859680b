"""The client app of plain Flower: one message for one virtual user, as Flower's simulations do it."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from experiments.contestants import workload

app = ClientApp()
models: dict[tuple[str, str], torch.nn.Module] = {}  # made at the first message of a process, as Flower has no place for it


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a user from the model in the message, and reply with the user's."""
    torch.set_num_threads(1)
    config = message.content.config_records["config"]
    name, device = str(config["model"]), str(config["device"])
    model = models.setdefault((name, device), workload.make_model(name).to(device))
    state = message.content.array_records["arrays"].to_torch_state_dict()
    update = workload.train_user(model, [value.to(device) for value in state.values()], int(context.node_config["partition-id"]))
    moved = {key: value + part.cpu() for (key, value), part in zip(state.items(), update, strict=True)}
    content = RecordDict({"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": workload.SAMPLES})})
    return Message(content, reply_to=message)
