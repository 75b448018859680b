"""The ClientApp: trains and evaluates whatever users a message names. The same app serves simulations and devices."""

from functools import lru_cache

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients import device, messages
from clients.states import states_at
from fedclip.client import Client, train_blocks
from fedclip.codec import DenseCodec
from fedclip.process import settle_process
from fedclip.replica import Replica
from fedclip.site import Site, evaluate_units
from fedclip.tasks.build import TaskRecipe

app = ClientApp()


@lru_cache(maxsize=1)
def resident(task: str, where: str) -> Site:
    """Return this process's task and model, built at the first message: Flower gives an app no place of its own to keep them."""
    if where == "cpu":
        settle_process()
    built = TaskRecipe.from_json(task).build()
    return Site(built, Replica.of(built, where))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the users of a request one after another; reply with their exact sum, or with each encoded update."""
    request = messages.read_train_request(message.content)
    if request.errand is not None:
        settle_process()
        return Message(device.train(request, context.node_config), reply_to=message)
    site = resident(request.task, request.device)
    states = states_at(request.states)
    if request.reply == "sums":
        content = messages.sums_reply(train_blocks(site, request.spec, request.blocks, states))
    else:
        client = Client(site, request.spec, states)
        content = messages.updates_reply(list(client.contributions(request.blocks)))
        client.sync()
    if request.ahead:
        site.read_ahead(request.ahead, request.spec.streams)
    return Message(content, reply_to=message)


@app.query()
def name(message: Message, context: Context) -> Message:
    """Say what this node calls itself, to a server that takes nodes at their word."""
    return Message(RecordDict({"reply": ConfigRecord({"name": str(context.node_config.get("name", ""))})}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the model of a request on its held-out units."""
    request = messages.read_evaluate_request(message.content)
    if request.errand is not None:
        settle_process()
        return Message(device.evaluate(request, context.node_config), reply_to=message)
    site = resident(request.task, request.device)
    params = DenseCodec().decode(request.params, site.replica.layout).vector
    return Message(messages.evaluate_reply(evaluate_units(site, params, request.units)), reply_to=message)
