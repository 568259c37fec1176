"""Episodes in other projects' formats, in and out.

=====================  ===========================================================================================
``importing``          what every import shares: options, checks against the store, the summary
``robomimic``          demonstrations of LIBERO, robomimic, RoboCasa and robosuite (HDF5, ``data/demo_i``) into a store, with
                       ``observations``, ``instruction`` and, for files without pictures, ``recorded_states``
``cosmos_hdf5``        rollouts of the public cosmos-policy code (HDF5, a file per episode) into a store, and episodes of a
                       store as such files
``cosmos_demos``       successful episodes as the demonstration files of the public cosmos-policy trainer
``libero``             successful episodes of LIBERO's tasks in the layout of LIBERO's released demonstrations
``aloha``              episodes of ALOHA (HDF5, a file per episode, videos beside it), in and out
``lerobot``            episodes of a store as a LeRobot v3 dataset
``lerobot_import``     LeRobot v3 and v2 datasets into a store; ``lerobot_meta`` reads what describes them, ``lerobot_pictures`` pictures
``pixels``             arrays of numbers as pictures of three colours, for every format
``parquet``            episodes of a store as Parquet, for everything else
``ray_data``           the store as a Ray Data dataset, read where it lies
=====================  ===========================================================================================

An export returns an :class:`~cosmos_ray.replay.exchange.exchanged.Exchanged`, an import an
:class:`~cosmos_ray.replay.exchange.exchanged.ImportSummary`: both name what was left out and why.
"""
