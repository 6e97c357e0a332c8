"""Algorithms of methods by a channel that suits them, as the tests of methods use them."""

import optax

from jaxfed import algorithms
from jaxfed.channels.average import mean, weighted_mean
from jaxfed.channels.difference import difference
from jaxfed.core.channel import chain
from jaxfed.core.federate import federate
from jaxfed.core.link import link
from tests.small import loss_model, no_private


def fedavg(loss, optimizer, num_clients, channel=None, private=no_private):
    return federate(algorithms.fedavg(loss_model(loss, private), optimizer), channel or mean(), num_clients)


def fedopt(loss, optimizer, server, num_clients, channel=None, private=no_private):
    method = algorithms.fedavg(loss_model(loss, private), optimizer)._replace(server=server)
    return federate(method, channel or mean(), num_clients)


def fedsgd(loss, server, num_clients, channel=None, private=no_private, optimizer=None):
    method = algorithms.fedsgd(loss_model(loss, private), optimizer or optax.sgd(0.1))._replace(server=server)
    return federate(method, channel or mean(), num_clients)


def fedsgd_difference(loss, server, num_clients, private=no_private, optimizer=None):
    return fedsgd(loss, server, num_clients, chain(difference(), mean()), private, optimizer)


def fedprox(loss, optimizer, num_clients, proximal=0.01, channel=None, private=no_private):
    return federate(
        algorithms.fedprox(loss_model(loss, private), optimizer, proximal=proximal), channel or mean(), num_clients
    )


def scaffold(loss, optimizer, num_clients, channel=None, private=no_private):
    method = algorithms.scaffold(loss_model(loss, private), optimizer, num_clients=num_clients)
    return federate(method, channel or mean(), num_clients)


def feddyn(loss, optimizer, num_clients, strength=0.1, channel=None, private=no_private):
    method = algorithms.feddyn(loss_model(loss, private), optimizer, strength=strength, num_clients=num_clients)
    return federate(method, channel or mean(), num_clients)


def fednova(loss, optimizer, num_clients, channel=None, private=no_private):
    return federate(algorithms.fednova(loss_model(loss, private), optimizer), channel or weighted_mean(), num_clients)


def mime(loss, optimizer, num_clients, correct=True, channel=None, private=no_private):
    return federate(
        algorithms.mime(loss_model(loss, private), optimizer, correct=correct), channel or mean(), num_clients
    )


def qfedavg(loss, optimizer, num_clients, q, rate, private=no_private):
    return federate(algorithms.qfedavg(loss_model(loss, private), optimizer, q=q, rate=rate), link(), num_clients)


def agnostic_fedavg(loss, optimizer, num_clients, num_train, groups=10, rate=0.1, private=no_private):
    method = algorithms.agnostic(loss_model(loss, private), optimizer, groups=groups, rate=rate, num_train=num_train)
    return federate(method, link(), num_clients)


def fedbuff(loss, optimizer, num_clients, history_length, exponent=0.5, rate=1.0, channel=None, private=no_private):
    method = algorithms.fedbuff(loss_model(loss, private), optimizer, exponent=exponent)._replace(
        server=optax.sgd(rate)
    )
    return federate(method, channel or mean(), num_clients, history_length=history_length)


def fedasync(loss, optimizer, num_clients, history_length, rate=0.6, exponent=0.5, private=no_private):
    method = algorithms.fedasync(loss_model(loss, private), optimizer, rate=rate, exponent=exponent)
    return federate(method, mean(), num_clients, history_length=history_length)


def gpfedrec(loss, optimizer, num_clients, strength=0.1, threshold=1.0, channel=None, private=no_private):
    method = algorithms.gpfedrec(
        loss_model(loss, private), optimizer, by_row=True, strength=strength, neighbours_count=0, threshold=threshold
    )
    return federate(method, channel or mean(), num_clients)
