# shellcheck shell=bash disable=SC2154 # from guest/run
# A filter's place under device-mapper volumes that are in use: the tracker's own tests, one process
# each, then what udev makes of the device below.
modprobe -a dm-mod dm-crypt dm-delay dm-snapshot dm-era dm-raid dm-multipath dm-round-robin loop
mkdir -p /run/lock/lvm

in_the_lab() { # in_the_lab TEST
    "$tests/real_splice" --ignored --exact --nocapture "in_the_lab_$1" &&
        # A filter that matches nothing is green as well.
        grep -q '^test result: ok. 1 passed' "$output"
}
for test in in_and_out_under_a_writer a_mounted_file_system_stays_whole each_step_may_be_repeated \
    what_cannot_be_spliced_is_refused another_table_is_noticed writes_beside_the_filter_are_counted \
    a_slow_disk_is_not_waited_for nobodys_death_leaves_it_suspended \
    a_swapper_killed_at_any_moment_changes_all_or_nothing what_lvm_does_is_noticed; do
    check "${test//_/ }" in_the_lab "$test"
    note_lines '^-- ' | sed 's/^-- -- /-- /'
done
