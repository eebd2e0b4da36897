"""DVS128 Gesture (Amir et al., 2017); `dvs_gesture.py` reads it."""

from spikefleet_pipelines.sources.source import Source, SourceOptions, recordings_holdout_field


class DvsGestureOptions(SourceOptions):
    """Validation recordings; train and test are the data set's own, which have different people."""

    holdout: float = recordings_holdout_field(0.1)


DVS_GESTURE = Source(
    name="dvs_gesture",
    description="DVS128 Gesture: 11 gestures of arms and hands, 128x128; a recording is one gesture",
    reader="spikefleet_pipelines.sources.dvs_gesture:read_dvs_gesture",
    options=DvsGestureOptions,
    files="trials_to_train.txt, trials_to_test.txt and the files they list, *.aedat and *_labels.csv (or ibmGestureTrain/ "
    "and ibmGestureTest/ with user*/*.npy, as tonic has it),",
    events=True,
)
