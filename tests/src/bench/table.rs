//! The results as a table with ratios, for a terminal and for the README.

use super::{
    ETCD, ETCD_TLS, Results,
    failover::Gaps,
    growth::{Lists, Quantiles},
    load::Cell,
    profile::WRITERS,
};

pub fn print(results: &Results) {
    println!();
    println!(
        "disk: {:.0} syncs a second by one writer, p50 {} us, p99 {} us; load average {:.1} to {:.1}",
        results.disk.per_second,
        results.disk.p50_micros,
        results.disk.p99_micros,
        results.load_average[0],
        results.load_average[1]
    );
    println!();
    println!(
        "{:<6}{:>8} {:<9}{:>9}{:>9}{:>8}{:>8}{:>10}{:>10}{:>10}{:>11}{:>8}",
        "", "clients", "", "ops/s", "spread", "÷ etcd", "÷ +tls", "p50 ms", "p99 ms", "p99.9 ms", "cpu us/op", "÷ sync"
    );
    for cell in &results.cells {
        let peer = |system: &str| {
            let same = |c: &&Cell| (c.operation, c.clients) == (cell.operation, cell.clients) && c.system == system;
            results.cells.iter().find(same)
        };
        print_cell(cell, [peer(ETCD), peer(ETCD_TLS)], results.disk.per_second);
    }
    println!();
    if !results.hot.is_empty() {
        println!("where the members' CPU time goes at {WRITERS} writers, by function:");
        results.hot.iter().for_each(|hot| println!("  {:>5.1} %  {}", hot.percent, hot.function));
    }
    println!("elections in {:.0} minutes of load: {}", results.steady.minutes, results.steady.elections);
    print_failover(results);
    print_growth(results);
    print_creation(results);
    for memory in &results.memory {
        println!("resident memory of a member, {}: {:.0} MiB", memory.system, memory.resident_mib);
    }
    for skipped in &results.skipped {
        println!("skipped: {skipped}");
    }
    for failed in &results.failed {
        println!("failed: {failed}");
    }
}

fn print_failover(results: &Results) {
    if !results.failover.is_empty() {
        println!("leader killed (kill -9), until the next acknowledged write, ms:");
        results.failover.iter().for_each(print_gaps);
    }
    if let Some(handovers) = &results.handovers {
        println!(
            "leader hands over, longest time between two acknowledged writes, ms ({} of {} attempts failed):",
            handovers.failed, handovers.attempts
        );
        [&handovers.gaps, &handovers.calm].into_iter().for_each(print_gaps);
    }
}

fn print_gaps(gaps: &Gaps) {
    let [p50, p90, max] = [0.5, 0.9, 1.0].map(|part| gaps.quantile(part));
    println!("  {:<8} n {:<3} p50 {p50:>6.0}   p90 {p90:>6.0}   max {max:>6.0}", gaps.system, gaps.millis.len());
}

fn print_growth(results: &Results) {
    let Some(growth) = &results.growth else { return };
    println!("{} machines on {} hosts that start nothing:", growth.machines, growth.hosts);
    println!(
        "  hosts joined {:.0}/s   machines created {:.0}/s   given a host {:.0}/s   said to run {:.0}/s",
        growth.joined_per_second, growth.created_per_second, growth.placed_per_second, growth.ran_per_second
    );
    for Lists { writes_per_second, whole_millis, page_millis } in &growth.lists {
        for (what, Quantiles { p50, p99 }) in [("the whole list", whole_millis), ("a page of 100", page_millis)] {
            println!("  {what:<15} p50 {p50:>7.2}   p99 {p99:>7.2} ms, beside {writes_per_second:.0} writes/s");
        }
    }
    let watching = &growth.watching;
    println!(
        "  a change reaches each of {} watchers: p50 {:.1}   p99 {:.1} ms; the last of them: p50 {:.1} ms",
        watching.watchers, watching.p50_millis, watching.p99_millis, watching.all_millis
    );
    for ear in &growth.listening {
        println!(
            "  a {:<8} with {:>6} beats/s ({:>6.0} answered) takes {:>5.1} % of a core",
            ear.role,
            ear.asked_per_second,
            ear.answered_per_second,
            ear.core * 100.0
        );
    }
    println!("  resident memory of a member: {:.0} MiB", growth.resident_mib);
    println!("  a follower that was killed is back in {:.1} s", growth.restart_seconds);
    println!(
        "  leader killed: next write {:.0} ms, last host in session with the next leader {:.1} s",
        growth.failover.write_millis, growth.failover.sessions_seconds
    );
    println!(
        "  a member with an empty disk joins in {:.1} s; longest time without a write meanwhile {:.0} ms",
        growth.joining.seconds, growth.joining.gap_millis
    );
}

fn print_creation(results: &Results) {
    let Some(creation) = &results.creation else { return };
    let millis = |micros: u64| micros as f64 / 1000.0;
    println!("vm create, ms:");
    let times = [
        ("accepted, until libvirtd begins to start it", &creation.issued),
        ("accepted, until it is known to run", &creation.trefoil),
        ("the same domain by libvirt alone", &creation.libvirt),
    ];
    for (what, times) in times {
        let [p50, p90, p99] = [times.p50_micros, times.p90_micros, times.p99_micros].map(millis);
        println!("  {what:<44} n {:<3} p50 {p50:>5.0}   p90 {p90:>5.0}   p99 {p99:>5.0}", times.micros.len());
    }
    println!("  ratio of medians {:.2}", creation.ratio_of_medians);
}

fn print_cell(cell: &Cell, peers: [Option<&Cell>; 2], syncs: f64) {
    let millis = |micros: u64| micros as f64 / 1000.0;
    let ratio = |peer: Option<&Cell>| {
        peer.map_or_else(|| "-".to_owned(), |peer| format!("{:.2}", cell.throughput() / peer.throughput()))
    };
    println!(
        "{:<6}{:>8} {:<9}{:>9.0}{:>7.0} %{:>8}{:>8}{:>10.2}{:>10.2}{:>10.2}{:>11.0}{:>8.2}{}",
        cell.operation,
        cell.clients,
        cell.system,
        cell.throughput(),
        cell.spread_percent(),
        ratio(peers[0]),
        ratio(peers[1]),
        millis(cell.p50_micros),
        millis(cell.p99_micros),
        millis(cell.p999_micros),
        cell.server_cpu_micros,
        cell.throughput() / syncs,
        if cell.errors > 0 { format!("  {} errors", cell.errors) } else { String::new() }
    );
}
