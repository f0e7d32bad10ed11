//! Explores the model and prints the table of verdicts, with the shortest counterexamples.

use std::{
    env,
    fmt::Display,
    io::{self, Write},
    process::ExitCode,
    time::Instant,
};

use multifd_model::{
    commit::variants::{CommitVerdict, commits, mutants},
    devices::variants::{DeviceVariant, devices, devices_done_wrong},
    variants::{Effort, Variant, Verdict, late_channels, protocols, removals},
};

fn main() -> ExitCode {
    let mut effort = Effort::Full;
    let mut traces = false;
    for argument in env::args().skip(1) {
        match argument.as_str() {
            "--quick" => effort = Effort::Quick,
            "--traces" => traces = true,
            _ => {
                eprintln!("usage: multifd-model [--quick] [--traces]");
                return ExitCode::from(2);
            }
        }
    }
    let begun = Instant::now();
    let (mut states, mut caught, mut wrong) = (0, 0, 0);
    let (mut protocols, mut removals) = (protocols(), removals());
    let (late, late_done_wrong) =
        late_channels().into_iter().partition::<Vec<_>, _>(|variant| variant.expected.is_none());
    protocols.extend(late);
    removals.extend(late_done_wrong);
    println!("| protocol | verdict | states | steps | s |\n|---|---|---|---|---|");
    for variant in &protocols {
        let verdict = variant.verdict(effort);
        states += verdict.states;
        wrong += usize::from(!verdict.is(variant.expected));
        print_row(variant, &verdict);
        print_traces(&verdict, traces);
    }
    println!("\n| left out or done wrong | verdict | states | steps | s |\n|---|---|---|---|---|");
    for variant in &removals {
        let verdict = variant.verdict(effort);
        states += verdict.states;
        wrong += usize::from(!verdict.is(variant.expected));
        caught += usize::from(variant.expected.is_some() && verdict.is(variant.expected));
        print_row(variant, &verdict);
        print_traces(&verdict, traces);
    }
    let harmful = removals.iter().filter(|variant| variant.expected.is_some()).count();
    let seconds = begun.elapsed().as_secs_f64();
    let largest = effort.largest();
    test_support::report(
        "proof",
        &format!(
            "model | {largest} (channels × rounds × pages) | {states} states | {caught} of {harmful} | {seconds:.0} s"
        ),
    );
    wrong += device_state(traces);
    wrong += commit(traces);
    if wrong > 0 {
        eprintln!("{wrong} verdicts are not as expected");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Explores device state on its way, and returns how many verdicts are not as expected.
fn device_state(traces: bool) -> usize {
    let begun = Instant::now();
    let (mut states, mut caught, mut wrong) = (0, 0, 0);
    let (devices, done_wrong) = (devices(), devices_done_wrong());
    for (title, variants) in [("device state", &devices), ("device state, done wrong", &done_wrong)] {
        println!("\n| {title} | verdict | states | steps |\n|---|---|---|---|");
        for variant in variants {
            let DeviceVariant { name, expected, .. } = variant;
            let verdict = variant.verdict();
            states += verdict.states;
            wrong += usize::from(!verdict.is(*expected));
            caught += usize::from(expected.is_some() && verdict.is(*expected));
            let is_expected = verdict.is(*expected);
            print_harm_row(name, verdict.harm.as_ref(), is_expected, (verdict.states, verdict.steps));
            print_steps(verdict.harm.as_ref(), traces);
        }
    }
    let harmful = done_wrong.iter().filter(|variant| variant.expected.is_some()).count();
    let seconds = begun.elapsed().as_secs_f64();
    test_support::report(
        "proof",
        &format!(
            "model | device state on its way, a failure in any state | {states} states | {caught} of {harmful} | {seconds:.0} s"
        ),
    );
    wrong
}

/// Explores the commit, and returns how many verdicts are not as expected.
fn commit(traces: bool) -> usize {
    let begun = Instant::now();
    let (mut states, mut caught, mut wrong) = (0, 0, 0);
    let (commits, mutants) = (commits(), mutants());
    let mut outcomes = Vec::new();
    for (title, variants) in [("commit", &commits), ("commit, done wrong", &mutants)] {
        println!("\n| {title} | verdict | states | steps |\n|---|---|---|---|");
        for variant in variants {
            let verdict = variant.verdict();
            states += verdict.states;
            wrong += usize::from(!verdict.is(variant.expected));
            caught += usize::from(variant.expected.is_some() && verdict.is(variant.expected));
            let is_expected = verdict.is(variant.expected);
            print_harm_row(variant.name, verdict.harm.as_ref(), is_expected, (verdict.states, verdict.steps));
            print_steps(verdict.harm.as_ref(), traces);
            outcomes.push((variant.name, verdict));
        }
    }
    outcomes.truncate(commits.len());
    print_outcomes(&outcomes);
    let harmful = mutants.iter().filter(|variant| variant.expected.is_some()).count();
    let seconds = begun.elapsed().as_secs_f64();
    let what = "the commit, with partitions, deaths, limits and cancels in every state";
    test_support::report(
        "proof",
        &format!("model | {what} | {states} states | {caught} of {harmful} | {seconds:.0} s"),
    );
    wrong
}

fn print_harm_row<H: Display, E>(
    name: &str,
    harm: Option<&(H, Vec<E>)>,
    is_expected: bool,
    (states, steps): (usize, usize),
) {
    let answer = match harm {
        None => "no harm".to_owned(),
        Some((harm, trace)) => format!("**{harm}**, in {} steps", trace.len()),
    };
    let unexpected = if is_expected { "" } else { " (UNEXPECTED)" };
    println!("| {name} | {answer}{unexpected} | {states} | {steps} |");
}

fn print_steps<H: Display, E: Display>(harm: Option<&(H, Vec<E>)>, wanted: bool) {
    if let (true, Some((harm, trace))) = (wanted, harm) {
        println!();
        for (number, event) in trace.iter().enumerate() {
            println!("    {:>2}  {event}", number + 1);
        }
        println!("        {harm}\n");
    }
}

/// How the commit can end, and where the destination may be while the source is in doubt.
fn print_outcomes(outcomes: &[(&str, CommitVerdict)]) {
    println!("\n| commit | source in the end | destination in the end | states |\n|---|---|---|---|");
    for (name, verdict) in outcomes {
        for ((source, destination), states) in &verdict.ends {
            let source = source.map_or("Dead".to_owned(), |phase| format!("{phase:?}"));
            println!("| {name} | {source} | {destination:?} | {states} |");
        }
    }
    println!("\n| commit | destination while the source has no answer | states |\n|---|---|---|");
    for (name, verdict) in outcomes {
        for (destination, states) in &verdict.doubts {
            println!("| {name} | {destination:?} | {states} |");
        }
    }
}

fn print_row(variant: &Variant, verdict: &Verdict) {
    let answer = match verdict.counterexample() {
        None => "no harm".to_owned(),
        Some(counterexample) => {
            let (channels, rounds, pages) = counterexample.size;
            let length = counterexample.trace.len();
            format!("**{}**, in {length} steps at {channels}×{rounds}×{pages}", counterexample.harm)
        }
    };
    let unexpected = if verdict.is(variant.expected) { "" } else { " (UNEXPECTED)" };
    let (name, states, steps, seconds) = (variant.name, verdict.states, verdict.steps, verdict.took.as_secs_f64());
    println!("| {name} | {answer}{unexpected} | {states} | {steps} | {seconds:.1} |");
    // Somebody may be waiting for it; a closed terminal is no reason to stop.
    let _ = io::stdout().flush();
}

fn print_traces(verdict: &Verdict, wanted: bool) {
    if let (true, Some(counterexample)) = (wanted, verdict.counterexample()) {
        println!();
        for (number, event) in counterexample.trace.iter().enumerate() {
            println!("    {:>2}  {event}", number + 1);
        }
        println!("        {}\n", counterexample.harm);
    }
}
