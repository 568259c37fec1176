"""The stages of the loop: collect, pretrain, rollout, refine, evaluate, plan, report; ``demo`` runs them in order."""
