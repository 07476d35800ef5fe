"""One rented GPU pod on RunPod: decisions, its API, what runs inside it, what is brought home.

    gpus, bill, lifecycle, request, names   pure: which GPU, what it cost, what to do next,
                                            what to ask for, what may be fetched
    book                                    the local state: every pod ever asked for
    api, client                             the two wires: RunPod's REST API; our agent in the pod
    control                                 acts on what `lifecycle` decides
    sync                                    brings results home
    agent, watchdog                         run inside the pod

Neither `control` nor `watchdog` reads a clock of its own: `clock.Clock` is given to them.
"""
