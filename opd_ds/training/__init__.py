"""The round: rollout, teachers, buffer, loss, step."""
