"""The federated round: read this first."""
